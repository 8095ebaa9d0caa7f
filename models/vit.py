"""Vision transformers of self-supervised teachers that torchvision has no builder for.

Touvron et al., "Training data-efficient image transformers", ICML 2021, table 1 (tiny and small); Caron et al.,
"Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021 (patches of 8); Chen et al., "An Empirical
Study of Training Self-Supervised Vision Transformers", ICCV 2021, section 4 (MoCo v3's small ViT has 12 heads).
"""

from __future__ import annotations

from torch import nn
from torchvision.models import VisionTransformer

VITS = {  # (patch size, width, heads); all have 12 layers and an MLP four times as wide
    "vit_ti_16": (16, 192, 3),
    "vit_s_16": (16, 384, 6),
    "vit_s_16_12h": (16, 384, 12),
    "vit_s_8": (8, 384, 6),
    "vit_b_8": (8, 768, 12),
}


def build_vit(arch: str, image_size: int) -> VisionTransformer:
    """One of ``VITS`` with a classifier of 1,000 classes, freshly initialised."""
    return VisionTransformer(**vit_options(arch, image_size))


def vit_options(arch: str, image_size: int) -> dict[str, int]:
    """The arguments of torchvision's VisionTransformer that make one of ``VITS``."""
    patch, width, heads = VITS[arch]
    return {"image_size": image_size, "patch_size": patch, "num_layers": 12, "num_heads": heads, "hidden_dim": width,
            "mlp_dim": 4 * width}


def attention_heads(backbone: nn.Module) -> int | None:
    """The number of attention heads of a torchvision or timm transformer, which the shapes of its tensors do not show;
    None for other networks."""
    if isinstance(backbone, VisionTransformer):
        return backbone.encoder.layers[0].num_heads
    try:
        return backbone.get_submodule("blocks.0.attn").num_heads
    except AttributeError:
        return None
