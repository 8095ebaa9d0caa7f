"""The mobile networks of the original CoSS code, with its parameter names, so that its files are read and written
unchanged.

Tan and Le, "EfficientNet", ICML 2019, as built by efficientnet_pytorch, SEED and CoSS, and Howard et al., "Searching
for MobileNetV3", ICCV 2019, as built by SEED and CoSS. Differences from torchvision's networks, whose values are in
brackets:

    EfficientNet   batch norm with eps 1e-3 and momentum 0.01 [1e-5 and 0.1]; "same" padding, with one more pixel at
                   the right and bottom of convolutions with stride 2; PyTorch's default initialisation [He]; dropout
                   on the pooled features during distillation [removed with the classifier]
    MobileNetV3    batch norm with eps 1e-5 and momentum 0.1 [1e-3 and 0.01]; squeeze-and-excitation before the
                   activation in blocks that expand [after it]; features after the hidden layer, 1,280 or 1,024 wide
                   [pooled features, 960 or 576], with dropout during distillation
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EFFICIENTNETS = {  # width factor, depth factor, the image size that the padding is for, dropout
    "efficientnet_b0_coss": (1.0, 1.0, 224, 0.2),
    "efficientnet_b1_coss": (1.0, 1.1, 240, 0.2),
    "efficientnet_b2_coss": (1.1, 1.2, 260, 0.3),
    "efficientnet_b3_coss": (1.2, 1.4, 300, 0.3),
}
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320))  # of B0: number of blocks, kernel, stride of the first block, expansion, channels
MOBILENETS = {  # blocks (kernel, expanded channels, channels, squeeze-and-excitation, Hardswish, stride), feature width
    "mobilenetv3_large": ((
        (3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2), (5, 120, 40, 1, 0, 1),
        (5, 120, 40, 1, 0, 1), (3, 240, 80, 0, 1, 2), (3, 200, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1),
        (3, 184, 80, 0, 1, 1), (3, 480, 112, 1, 1, 1), (3, 672, 112, 1, 1, 1), (5, 672, 160, 1, 1, 2),
        (5, 960, 160, 1, 1, 1), (5, 960, 160, 1, 1, 1)), 1280),
    "mobilenetv3_small": ((
        (3, 16, 16, 1, 0, 2), (3, 72, 24, 0, 0, 2), (3, 88, 24, 0, 0, 1), (5, 96, 40, 1, 1, 2), (5, 240, 40, 1, 1, 1),
        (5, 240, 40, 1, 1, 1), (5, 120, 48, 1, 1, 1), (5, 144, 48, 1, 1, 1), (5, 288, 96, 1, 1, 2),
        (5, 576, 96, 1, 1, 1), (5, 576, 96, 1, 1, 1)), 1024),
}
ORIGINALS = (*EFFICIENTNETS, *MOBILENETS)


def build_original(arch: str) -> nn.Module:
    """One of ``ORIGINALS`` with a classifier ``fc`` of 1,000 classes, initialised by the original's random numbers."""
    return EfficientNet(*EFFICIENTNETS[arch]) if arch in EFFICIENTNETS else MobileNetV3(*MOBILENETS[arch])


def of_the_paper(arch: str) -> str:
    """A note for torchvision's networks that have the name of a row of the paper; '' for all others."""
    named = f"{arch}_coss"
    return (f"{arch} is torchvision's network; the paper's row is {named}, the original's own network, which differs "
            "in batch norm, padding, dropout and initial weights") if named in EFFICIENTNETS else ""


def name_there(arch: str) -> str:
    """The original's name for one of our architectures, which its files record."""
    return arch.removesuffix("_coss")


class SameConv2d(nn.Conv2d):
    """A convolution with stride 2 over an even number of pixels, padded as in TensorFlow: more at the right and
    bottom."""

    def forward(self, images: Tensor) -> Tensor:
        total = self.kernel_size[0] - self.stride[0]
        return super().forward(F.pad(images, (total // 2, total - total // 2) * 2))


class EfficientNet(nn.Module):
    """Images [b, 3, H, W] to logits [b, 1000]; the pooled features before ``fc`` are 1,280 wide for B0."""

    def __init__(self, width: float, depth: float, size: int, dropout: float) -> None:
        super().__init__()
        channels = _divisible(32 * width)
        self._conv_stem, size = _same_conv(3, channels, 3, 2, size)
        self._bn0 = _norm(channels)
        self._blocks = nn.ModuleList()
        for repeats, kernel, stride, expand, out in STAGES:
            for number in range(math.ceil(repeats * depth)):
                block = MBConv(channels, _divisible(out * width), kernel, 1 if number else stride, expand, size)
                self._blocks.append(block)
                channels, size = _divisible(out * width), block.size
        for number, block in enumerate(self._blocks):
            block.drop = 0.2 * number / len(self._blocks)
        features = _divisible(1280 * width)
        self._conv_head = nn.Conv2d(channels, features, 1, bias=False)
        self._bn1 = _norm(features)
        self._swish, self._avg_pooling, self._dropout = nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Dropout(dropout)
        self.fc = nn.Linear(features, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self._swish(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            x = block(x)
        x = self._avg_pooling(self._swish(self._bn1(self._conv_head(x)))).flatten(1)
        return self.fc(self._dropout(x))


class MBConv(nn.Module):
    """An inverted bottleneck. If it has a skip connection, training skips it for an image with probability ``drop``."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expand: int, size: int) -> None:
        super().__init__()
        inside, squeezed = channels * expand, max(1, channels // 4)
        if expand != 1:
            self._expand_conv, self._bn0 = nn.Conv2d(channels, inside, 1, bias=False), _norm(inside)
        self._depthwise_conv, self.size = _same_conv(inside, inside, kernel, stride, size, groups=inside)
        self._bn1 = _norm(inside)
        self._se_reduce, self._se_expand = nn.Conv2d(inside, squeezed, 1), nn.Conv2d(squeezed, inside, 1)
        self._project_conv, self._bn2 = nn.Conv2d(inside, out, 1, bias=False), _norm(out)
        self._swish = nn.SiLU()
        self.expands, self.skips, self.drop = expand != 1, stride == 1 and channels == out, 0.0

    def forward(self, images: Tensor) -> Tensor:
        x = self._swish(self._bn0(self._expand_conv(images))) if self.expands else images
        x = self._swish(self._bn1(self._depthwise_conv(x)))
        x = torch.sigmoid(self._se_expand(self._swish(self._se_reduce(F.adaptive_avg_pool2d(x, 1))))) * x
        x = self._bn2(self._project_conv(x))
        if not self.skips:
            return x
        if self.training and self.drop:
            kept = 1 - self.drop
            x = x / kept * (kept + torch.rand((len(x), 1, 1, 1), dtype=x.dtype, device=x.device)).floor()
        return x + images


class MobileNetV3(nn.Module):
    """Images [b, 3, H, W] to logits [b, 1000]; the features [b, ``width``] before ``fc`` come from a hidden layer."""

    def __init__(self, blocks: tuple[tuple[int, ...], ...], width: int) -> None:
        super().__init__()
        channels, layers = 16, [_conv_norm(3, 16, 3, 2)]
        for kernel, inside, out, squeeze, hard, stride in blocks:
            layers.append(InvertedResidual(channels, inside, out, kernel, stride, squeeze, hard))
            channels = out
        self.features = nn.Sequential(*layers)
        self.conv, self.avgpool = _conv_norm(channels, inside, 1, 1), nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(inside, width), nn.Hardswish(), nn.Dropout(0.2))
        self.fc = nn.Linear(width, 1000)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.avgpool(self.conv(self.features(images))).flatten(1)
        return self.fc(self.classifier(x))


class InvertedResidual(nn.Module):
    """Of MobileNetV3."""

    def __init__(self, channels: int, inside: int, out: int, kernel: int, stride: int, squeeze: int, hard: int) -> None:
        super().__init__()
        act = nn.Hardswish if hard else functools.partial(nn.ReLU, inplace=True)
        depthwise = nn.Conv2d(inside, inside, kernel, stride, kernel // 2, groups=inside, bias=False)
        attention = SqueezeExcitation(inside) if squeeze else nn.Identity()
        project = nn.Conv2d(inside, out, 1, bias=False), nn.BatchNorm2d(out)
        if channels == inside:
            self.conv = nn.Sequential(depthwise, nn.BatchNorm2d(inside), act(), attention, *project)
        else:
            self.conv = nn.Sequential(nn.Conv2d(channels, inside, 1, bias=False), nn.BatchNorm2d(inside), act(),
                                      depthwise, nn.BatchNorm2d(inside), attention, act(), *project)
        self.skips = stride == 1 and channels == out

    def forward(self, images: Tensor) -> Tensor:
        return images + self.conv(images) if self.skips else self.conv(images)


class SqueezeExcitation(nn.Module):
    """MobileNetV3's squeeze-and-excitation, with linear layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = _divisible(channels // 4)
        self.fc = nn.Sequential(nn.Linear(channels, squeezed), nn.ReLU(inplace=True), nn.Linear(squeezed, channels),
                                nn.Hardsigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


def _same_conv(channels: int, out: int, kernel: int, stride: int, size: int, groups: int = 1) -> tuple[nn.Conv2d, int]:
    """A convolution without bias with the "same" padding for maps of ``size`` pixels, and the size of its output. The
    padding is fixed, whatever the size of the maps in use."""
    uneven = stride == 2 and size % 2 == 0
    conv = (SameConv2d(channels, out, kernel, stride, groups=groups, bias=False) if uneven else
            nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False))
    return conv, math.ceil(size / stride)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _conv_norm(channels: int, out: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out),
                         nn.Hardswish())


def _divisible(channels: float) -> int:
    """The nearest multiple of 8 that is at least 8 and at least nine tenths of ``channels``."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 * (nearest < 0.9 * channels)
