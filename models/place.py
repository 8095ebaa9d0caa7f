"""Placing a network on its device, with the memory layout and the convolutions that are fastest there."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Network = TypeVar("Network", bound="nn.Module")


def place(network: Network, device: torch.device) -> Network:
    """Move ``network`` to ``device`` with weights in channels-last layout; on a CPU its plain convolutions become
    :class:`CPUConv2d`. Names, parameters and state dicts stay the same."""
    network = network.to(device, memory_format=torch.channels_last)
    for module in network.modules() if device.type == "cpu" else ():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.__class__ = CPUConv2d
    return network


class CPUConv2d(nn.Conv2d):
    """A convolution that avoids cases in which oneDNN is slow (docs/results/SPEED.md has the times).

    On maps of a few pixels, where padding covers most of the kernel, it is one matrix product, which is two to four
    times as fast. A depthwise convolution that is trained and has a stride or a large kernel is computed in float32
    under autocast, because its gradient in bfloat16 takes up to twenty times as long.
    """

    def forward(self, images: Tensor) -> Tensor:
        """[b, c, H, W] to [b, n, h, w]."""
        if self.groups == 1 and self.dilation == (1, 1) and self._is_small(images):
            return self._product(images)
        slow_gradient = self.groups == self.in_channels > 1 and (max(self.stride) > 1 or max(self.kernel_size) > 3)
        if slow_gradient and self.weight.requires_grad:
            with torch.autocast("cpu", enabled=False):
                return super().forward(images.to(self.weight.dtype))
        return super().forward(images)

    def _is_small(self, images: Tensor) -> bool:
        sides = [(side + 2 * pad - kernel) // stride + 1 for side, pad, kernel, stride in
                 zip(images.shape[2:], self.padding, self.kernel_size, self.stride, strict=True)]
        return 0 < sides[0] * sides[1] <= (16 if self.kernel_size == (1, 1) else 4)

    def _product(self, images: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            images = images.to(torch.get_autocast_dtype("cpu"))  # now, because below each pixel is copied several times
        (high, wide), (down, right), (top, left) = self.kernel_size, self.stride, self.padding
        x = F.pad(images.permute(0, 2, 3, 1), (0, 0, left, left, top, top))                      # [b, H, W, c]
        x = x.unfold(1, high, down).unfold(2, wide, right).permute(0, 1, 2, 4, 5, 3)             # [b, h, w, kh, kw, c]
        rows = x.reshape(x.shape[:3].numel(), -1)  # two dimensions; with more, F.linear may make a product per image
        y = F.linear(rows, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)                # [b h w, n]
        return y.view(*x.shape[:3], -1).permute(0, 3, 1, 2)
