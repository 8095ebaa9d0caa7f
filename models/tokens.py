"""Vision transformers of torchvision and timm: their tokens, position embeddings, and which tokens are the feature."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from runtime.errors import UserError

FEATURES = ("auto", "cls", "mean", "cls+mean", "pool")
# The feature and the image size of the authors' own evaluation, if they differ from the output of timm's network and
# from the size that its position embeddings are for; by a part of timm's name. Oquab et al., "DINOv2", TMLR 2024;
# Siméoni et al., "DINOv3", arXiv 2508.10104; He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022
EVALUATED = {"_dinov3": "cls", ".mae": "mean"}
EVALUATED_AT = {"_dinov2": 224, "_radio": 224}  # pixels; the released position embeddings are for 518 and 2,048


def evaluated_size(arch: str) -> int | None:
    """The image size at which the authors evaluate ``arch``, if its position embeddings are for another; else None."""
    return next((size for part, size in EVALUATED_AT.items() if part in arch), None)


def is_transformer(backbone: nn.Module) -> bool:
    """Whether the network turns images into patch tokens that :func:`vit_tokens` can compute for any image size."""
    return isinstance(backbone, VisionTransformer) or all(hasattr(backbone, name) for name in (
        "patch_embed", "pos_embed", "blocks", "num_prefix_tokens", "forward_features", "forward_head",
        "no_embed_class"))


def patch_of(backbone: nn.Module) -> int | None:
    """The side of a patch in pixels, of which image sizes must be multiples; None for networks without patches."""
    if isinstance(backbone, VisionTransformer):
        return backbone.patch_size
    embed = getattr(backbone, "patch_embed", None)
    return embed.feat_ratio() if getattr(embed, "grid_size", None) and hasattr(embed, "feat_ratio") else None


def refuse_split_patches(arch: str, patch: int | None, image_size: int, flag: str) -> None:
    """Raise :class:`UserError`, which advises ``flag``, if ``patch`` does not divide ``image_size``."""
    if patch and image_size % patch:
        below = image_size // patch * patch
        fitting = " or ".join(str(size) for size in (below, below + patch) if size)
        raise UserError(f"{arch} has patches of {patch} pixels, which do not divide images of {image_size}; give "
                        f"{flag} {fitting}")


# ---- position embeddings


def position_table(backbone: nn.Module) -> tuple[str, int] | None:
    """The name of a transformer's absolute position embeddings [1, prefix + s s, d] in its state dict, and ``prefix``;
    None if there are none (rotary and relative positions do not depend on the image size)."""
    if isinstance(backbone, VisionTransformer):
        return "encoder.pos_embedding", 1
    if not is_transformer(backbone) or backbone.pos_embed is None:
        return None
    return "pos_embed", 0 if backbone.no_embed_class else backbone.num_prefix_tokens


def positions(table: Tensor, h: int, w: int, prefix: int = 1, antialias: bool = False) -> Tensor:
    """Resample position embeddings of s x s patches, [1, prefix + s s, d], to h x w patches: [1, prefix + h w, d].

    The interpolation is bicubic, as DINO's evaluations do in each forward pass or, with ``antialias``, as timm does
    once for a network with another image size.
    """
    side = math.isqrt(table.shape[1] - prefix)
    if (h, w) == (side, side):
        return table
    square = table[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    grid = F.interpolate(square.float(), size=(h, w), mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([table[:, :prefix], grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def fitted_positions(table: Tensor, wanted: Tensor, prefix: int) -> tuple[Tensor, str] | None:
    """The position embeddings ``table`` of a file resampled to the shape of a network's own, ``wanted``, and what was
    done, in words; None if the two differ in more than the number of patches."""
    old, new = (math.isqrt(max(0, x.shape[1] - prefix)) if x.ndim == 3 else 0 for x in (table, wanted))
    if not old or not new or any(x.shape != (1, prefix + side * side, wanted.shape[2])
                                 for x, side in ((table, old), (wanted, new))) or old == new:
        return None
    return positions(table, new, new, prefix, antialias=True), f"positions resampled from {old}x{old} to {new}x{new}"


# ---- tokens


def vit_tokens(backbone: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """A ViT's tokens [b, prefix + h w, d] after the last layer and its norm, and the grid (h, w) of patches, for images
    [b, 3, H, W] of any size; pixels that do not fill a whole patch are cut off."""
    patch = patch_of(backbone)
    h, w = images.shape[2] // patch, images.shape[3] // patch
    if not h or not w:
        raise UserError(f"{backbone.spec.arch} has patches of {patch} pixels, but an image has only "
                        f"{images.shape[3]} x {images.shape[2]} pixels; give larger images")
    images = images[:, :, :h * patch, :w * patch]
    if isinstance(backbone, VisionTransformer):
        x = backbone.conv_proj(images).flatten(2).transpose(1, 2)                      # [b, h w, d]
        x = torch.cat([backbone.class_token.expand(x.shape[0], -1, -1), x], dim=1)  # len() would fix an export's batch
        x = x + positions(backbone.encoder.pos_embedding, h, w)
        return backbone.encoder.ln(backbone.encoder.layers(backbone.encoder.dropout(x))), (h, w)
    if backbone.pos_embed is None or (h, w) == tuple(backbone.patch_embed.grid_size):
        return backbone.forward_features(images), (h, w)
    whole, strict = backbone.pos_embed, backbone.patch_embed.strict_img_size
    prefix = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
    try:
        backbone.patch_embed.strict_img_size = False
        backbone.pos_embed = nn.Parameter(positions(whole, h, w, prefix), requires_grad=False)
        return backbone.forward_features(images), (h, w)
    finally:
        backbone.pos_embed, backbone.patch_embed.strict_img_size = whole, strict


# ---- the feature


def own_feature(backbone: nn.Module) -> str:
    """The output of the library's own forward pass, as one of ``FEATURES``."""
    if isinstance(backbone, VisionTransformer):
        return "cls"
    odd = (not hasattr(backbone, "num_prefix_tokens") or hasattr(backbone, "dist_token")
           or getattr(backbone, "attn_pool", None) is not None or getattr(backbone, "pool_include_prefix", False))
    return "pool" if odd else {"token": "cls", "avg": "mean"}.get(backbone.global_pool, "pool")


def choose_feature(backbone: nn.Module, arch: str, wanted: str, flag: str) -> str:
    """``wanted``, but with ``auto`` resolved, and ``pool`` replaced by ``cls`` or ``mean`` if it is the same.

    Raises :class:`UserError`, which begins with ``flag``, for tokens that the network does not have.
    """
    own = own_feature(backbone)
    if not isinstance(backbone, VisionTransformer) and not hasattr(backbone, "num_prefix_tokens"):
        if wanted in ("auto", "pool"):
            return own
        raise UserError(f"{flag} {wanted}: {arch} has no tokens to choose from, because its feature is pooled; omit "
                        "the flag")
    if wanted == "auto":
        return next((feature for part, feature in EVALUATED.items() if part in arch), own)
    if "cls" in wanted and not isinstance(backbone, VisionTransformer) and getattr(backbone, "cls_token", None) is None:
        raise UserError(f"{flag} {wanted}: {arch} has no class token; give mean or pool")
    projects = isinstance(getattr(backbone, "head", None), nn.Linear)  # CLIP's projection, part of its own feature
    return own if wanted == "pool" and not projects else wanted


def use_feature(backbone: nn.Module, feature: str) -> int:
    """Make ``backbone`` return ``feature`` (of :func:`choose_feature`). Returns the width of the feature as a multiple
    of the width of a token.

    The names of modules and tensors do not change. If the library's forward pass returns this feature, it stays.
    """
    if feature not in (own_feature(backbone), "pool"):
        kind = type(backbone)
        backbone.__class__ = type(kind.__name__, (ChosenFeature, kind), {"chosen_feature": feature})
    return 2 if feature == "cls+mean" else 1


def feature_of(backbone: nn.Module, tokens: Tensor) -> Tensor:
    """The feature [b, d] of ``backbone``, from its tokens [b, prefix + n, d] after the last norm."""
    feature = getattr(backbone, "chosen_feature", None)
    if isinstance(backbone, VisionTransformer):
        prefix, norm, head = 1, nn.Identity(), backbone.heads
        feature = feature or "cls"
    elif feature is None:
        return backbone.forward_head(tokens)
    else:  # networks that average tokens may have their last norm after that
        prefix, norm = backbone.num_prefix_tokens, getattr(backbone, "fc_norm", nn.Identity())
        head = backbone.head
    parts = {"cls": lambda: tokens[:, 0], "mean": lambda: tokens[:, prefix:].mean(dim=1)}
    return head(torch.cat([norm(parts[part]()) for part in feature.split("+")], dim=1))


class ChosenFeature:
    """A mix-in before a transformer's own class that returns another feature: [b, 3, S, S] to [b, d]."""

    def forward(self, images: Tensor) -> Tensor:
        tokens = (vit_tokens(self, images)[0] if isinstance(self, VisionTransformer) else
                  self.forward_features(images))
        return feature_of(self, tokens)
