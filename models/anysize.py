"""Trunks for images of any size and aspect ratio: pooled features, and feature maps.

A convolutional trunk takes such images unchanged. For a vision transformer, position embeddings are interpolated
(bicubic), as in Caron et al. ("Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021), and pixels that
do not fill a whole patch are cut off.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from models.tokens import feature_of, is_transformer, patch_of, vit_tokens
from runtime.errors import UserError


class AnySize(nn.Module):
    """``backbone`` (of models.backbones) for images [b, 3, H, W] with any H and W: pooled features [b, d]."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.is_transformer = is_transformer(backbone)

    def forward(self, images: Tensor) -> Tensor:
        if not self.is_transformer:
            try:
                return self.backbone(images)
            except (AssertionError, RuntimeError, ValueError) as error:
                raise UserError(f"{self.backbone.spec.arch} does not take images of {images.shape[3]} x "
                                f"{images.shape[2]} pixels ({' '.join(str(error).split())[:100]}); give another size, "
                                "or a network that takes images of any size") from None
        return feature_of(self.backbone, vit_tokens(self.backbone, images)[0])


class FeatureMap(nn.Module):
    """``backbone`` up to a feature map: images [b, 3, H, W] to [b, d, h, w], where h and w are about H / stride and
    W / stride.

    For a transformer, the map consists of the patch tokens after its last layer. For a convolutional trunk it is the
    output of the last stage with a stride of at most 16 (a ResNet's layer3); the strides of convolutions are removed
    until the map has ``stride``. A stride of 8 is usual for tracking objects (Jabri et al., "Space-Time Correspondence
    as a Contrastive Random Walk", NeurIPS 2020). Raises :class:`UserError` for a trunk that has no such map.
    """

    def __init__(self, backbone: nn.Module, stride: int = 8) -> None:
        super().__init__()
        self.is_transformer = is_transformer(backbone)
        self.backbone, self.stage, self.name = backbone, None, "patch tokens"
        if self.is_transformer:
            self.stride = patch_of(backbone)
            return
        self.backbone = copy.deepcopy(backbone)  # because the strides are changed below
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


class _Found(Exception):
    """Ends a forward pass after the requested stage."""


def _stop(found: list[Tensor], output: Tensor) -> None:
    found.append(output)
    raise _Found


PROBE = 256  # pixels


@torch.no_grad()
def _shapes(backbone: nn.Module) -> dict[nn.Module, tuple[int, int]]:
    """Heights of the input and output of each module for which both are maps [b, d, h, w], in the order in which the
    modules finish."""
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
    """The last stage with a stride of at most 16, and its stride. A stage is a child module; a child that shrinks the
    map by more than a factor of 2 contains several stages, namely its own children."""
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
    if len(fitting) < 2:  # the stem alone is not a stage
        raise UserError(f"{backbone.spec.arch} has no feature map with a stride of at most 16 pixels; give a "
                        "convolutional network such as a ResNet, or a vision transformer")
    return fitting[-1]


def _power_of_two(side: int) -> int:
    """The stride of a map with this side, rounded to a power of 2, since without padding maps are a little smaller."""
    return 2 ** round(math.log2(PROBE / side))


def _refine(backbone: nn.Module, stride: int) -> None:
    """Remove the stride of the modules that bring the total stride from ``stride`` / 2 to ``stride``."""
    for module, (before, after) in _shapes(backbone).items():
        if not isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) or after == before:
            continue
        if _power_of_two(after) == stride == 2 * _power_of_two(before):
            module.stride = (1, 1) if isinstance(module, nn.Conv2d) else 1
