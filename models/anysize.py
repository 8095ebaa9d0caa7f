"""Trunks for images of any size and proportions: pooled features, and maps of features.

A convolutional trunk takes such images as it is. A vision transformer's positions are interpolated, bicubic, as Caron
et al. do ("Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021), and pixels that do not fill a whole
patch are cut off.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from runtime.errors import UserError


class AnySize(nn.Module):
    """``backbone`` (of models.backbones) for images [b, 3, H, W] of any H and W: pooled features [b, d]."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.is_transformer = is_transformer(backbone)

    def forward(self, images: Tensor) -> Tensor:
        if not self.is_transformer:
            try:
                return self.backbone(images)
            except (AssertionError, RuntimeError, ValueError) as error:
                raise UserError(f"{self.backbone.spec.arch} does not take an image of {images.shape[3]} x "
                                f"{images.shape[2]} pixels ({' '.join(str(error).split())[:100]}); give another size, "
                                "or a network whose images may have any") from None
        tokens, _ = vit_tokens(self.backbone, images)
        if isinstance(self.backbone, VisionTransformer):
            return self.backbone.heads(tokens[:, 0])
        return self.backbone.forward_head(tokens)


class FeatureMap(nn.Module):
    """``backbone`` up to a map of features: images [b, 3, H, W] to [b, d, h, w], h and w about H and W by ``stride``.

    For a transformer: the patch tokens after its last layer. For a convolutional trunk: the last stage with a
    stride of 16 or less (a ResNet's layer3), whose strided convolutions lose their stride until the map has
    ``stride``; 8 is usual for tracking objects (Jabri et al., "Space-Time Correspondence as a Contrastive
    Random Walk", NeurIPS 2020). Raises :class:`UserError` for a trunk that has no such map.
    """

    def __init__(self, backbone: nn.Module, stride: int = 8) -> None:
        super().__init__()
        self.is_transformer = is_transformer(backbone)
        self.backbone, self.stage, self.name = backbone, None, "patch tokens"
        if self.is_transformer:
            self.stride = _patch(backbone)
            return
        self.backbone = copy.deepcopy(backbone)  # its strides are changed
        self.stage, self.stride = _stage(self.backbone)
        while self.stride > stride:
            _refine(self.backbone, self.stride)
            self.stride //= 2
        if _power_of_two(_shapes(self.backbone).get(self.stage, (0, PROBE))[1]) != self.stride:
            raise UserError(f"{backbone.spec.arch} does not work with a stride of {self.stride} pixels; give 16, or a "
                            "ResNet or a vision transformer")
        self.name = next(name for name, module in self.backbone.named_modules() if module is self.stage)

    def forward(self, images: Tensor) -> Tensor:
        if self.is_transformer:
            tokens, (h, w) = vit_tokens(self.backbone, images)
            return tokens[:, -h * w:].transpose(1, 2).unflatten(2, (h, w))
        found = []
        handle = self.stage.register_forward_hook(lambda _, __, output: _stop(found, output))
        try:
            self.backbone(images)
        except _Found:
            pass
        finally:
            handle.remove()
        return found[0]


def is_transformer(backbone: nn.Module) -> bool:
    """Whether it is a ViT, torchvision's or timm's, whose position embeddings tie it to an image size."""
    return isinstance(backbone, VisionTransformer) or _is_timm_vit(backbone)


def vit_tokens(backbone: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """A ViT's tokens [b, prefix + h w, d] after the last layer and its norm, and the grid's size in patches."""
    patch = _patch(backbone)
    h, w = images.shape[2] // patch, images.shape[3] // patch
    if not h or not w:
        raise UserError(f"{backbone.spec.arch} has patches of {patch} pixels, and an image of {images.shape[3]} x "
                        f"{images.shape[2]} pixels holds none; give larger ones")
    images = images[:, :, :h * patch, :w * patch]
    if isinstance(backbone, VisionTransformer):
        x = backbone.conv_proj(images).flatten(2).transpose(1, 2)                      # [b, h w, d]
        x = torch.cat([backbone.class_token.expand(len(x), -1, -1), x], dim=1)
        x = x + positions(backbone.encoder.pos_embedding, h, w)
        return backbone.encoder.ln(backbone.encoder.layers(backbone.encoder.dropout(x))), (h, w)
    grid = backbone.patch_embed.grid_size
    if backbone.pos_embed is None or (h, w) == tuple(grid):
        return backbone.forward_features(images), (h, w)
    whole, strict = backbone.pos_embed, backbone.patch_embed.strict_img_size
    prefix = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
    try:
        backbone.patch_embed.strict_img_size = False
        backbone.pos_embed = nn.Parameter(positions(whole, h, w, prefix), requires_grad=False)
        return backbone.forward_features(images), (h, w)
    finally:
        backbone.pos_embed, backbone.patch_embed.strict_img_size = whole, strict


def positions(table: Tensor, h: int, w: int, prefix: int = 1) -> Tensor:
    """Position embeddings [1, prefix + s s, d] of a square of patches, for h x w of them: [1, prefix + h w, d]."""
    side = int((table.shape[1] - prefix) ** 0.5)
    if (h, w) == (side, side):
        return table
    square = table[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    grid = F.interpolate(square.float(), size=(h, w), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :prefix], grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def _is_timm_vit(backbone: nn.Module) -> bool:
    return all(hasattr(backbone, name) for name in ("patch_embed", "pos_embed", "blocks", "num_prefix_tokens",
                                                    "forward_features", "forward_head", "no_embed_class"))


def _patch(backbone: nn.Module) -> int:
    return backbone.patch_size if isinstance(backbone, VisionTransformer) else backbone.patch_embed.patch_size[0]


class _Found(Exception):
    """Ends a forward pass after the requested stage."""


def _stop(found: list[Tensor], output: Tensor) -> None:
    found.append(output)
    raise _Found


PROBE = 256  # pixels


@torch.no_grad()
def _shapes(backbone: nn.Module) -> dict[nn.Module, tuple[int, int]]:
    """Height of each module's input and output in the order in which they finish, if both are maps [b, d, h, w]."""
    shapes: dict[nn.Module, tuple[int, int]] = {}

    def note(module: nn.Module, inputs: tuple, output: object) -> None:
        maps = [x for x in (*inputs[:1], output) if isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] == x.shape[3]]
        if len(maps) == 2:
            shapes[module] = maps[0].shape[2], maps[1].shape[2]

    handles = [module.register_forward_hook(note) for module in backbone.modules()]
    mode = backbone.training
    try:
        parameter = next(backbone.parameters())
        backbone.eval()(torch.zeros(1, 3, PROBE, PROBE, device=parameter.device, dtype=parameter.dtype))
    except (AssertionError, RuntimeError, ValueError):
        shapes = {}
    finally:
        backbone.train(mode)
        for handle in handles:
            handle.remove()
    return shapes


def _stage(backbone: nn.Module) -> tuple[nn.Module, int]:
    """The last stage with stride 16 or less, and its stride. Stages are children; a child in which the map shrinks by
    more than 2 contains several stages, its own children."""
    shapes = _shapes(backbone)

    def stages(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            before, after = shapes.get(child, (0, 0))
            if after > 1 and before / after > 2.5:
                yield from stages(child)
            elif after > 1 and before >= after:
                yield child

    found = [(child, _power_of_two(shapes[child][1])) for child in stages(backbone)]
    fitting = [(child, stride) for child, stride in found if stride <= 16]
    if len(fitting) < 2:  # a lone stem does not count as a stage
        raise UserError(f"{backbone.spec.arch} has no map of features with a stride of 16 pixels or less; take a "
                        "convolutional network (a ResNet) or a vision transformer")
    return fitting[-1]


def _power_of_two(side: int) -> int:
    """The stride of a map of this side; without padding it is a little smaller."""
    return 2 ** round(math.log2(PROBE / side))


def _refine(backbone: nn.Module, stride: int) -> None:
    """Remove the stride of 2 by which modules reach a total stride of ``stride``."""
    for module, (before, after) in _shapes(backbone).items():
        if not isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) or after == before:
            continue
        if _power_of_two(after) == stride == 2 * _power_of_two(before):
            module.stride = (1, 1) if isinstance(module, nn.Conv2d) else 1
