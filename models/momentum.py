"""Moving averages of a network: one that is saved beside it, and one that gives targets, with batch norm over a
shuffled batch.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, equation 2 and section 3.3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor, nn

from runtime.device import all_gather, broadcast, distributed, send
from runtime.settings import Setting

ContrastedWidth = Annotated[int, Setting("width of the contrasted features; default {default}, as in MoCo",
                                         "--moco-dim", least=1, metavar="D")]
Momentum = Annotated[float, Setting("momentum of the moving average of the network; default {default}, as in MoCo",
                                    "--moco-m", least=0, below=1, metavar="M")]
BatchNormParts = Annotated[int, Setting(
    "number of parts, over all processes, into which the shuffled batch of the momentum copy is split for batch norm, "
    "so that its statistics do not reveal the positive; default {default}, as on MoCo's 8 GPUs; parts have at least 2 "
    "images, so a small batch is split into fewer", "--bn-parts", least=1, metavar="N")]


class MovingAverage(nn.Module):
    """An exponential moving average of a network's weights and running statistics, to be saved beside the network."""

    def __init__(self, network: nn.Module, ema: Annotated[float, Setting(
            "keep a moving average of the student's weights with this decay (such as 0.999 or 0.9999) and write it to "
            "student_ema.pth; default {default}, no average", least=0, below=1, metavar="X")]) -> None:
        super().__init__()
        self.network, self.decay = copy.deepcopy(network).requires_grad_(False), ema

    def update(self, network: nn.Module) -> None:
        """Take one step towards ``network``; call this after each update of it."""
        follow(self.network, network, self.decay, buffers=True)


class MomentumStudent(MovingAverage):
    """A moving average of the student with batch-norm statistics of its own: uint8 images [b, 3, H, W] to outputs
    [b, d]."""

    def __init__(self, student: nn.Module, momentum: float = 0.999, bn_parts: int = 8) -> None:
        super().__init__(student, momentum)
        self.bn_parts = bn_parts

    def update(self, student: nn.Module) -> None:
        """Take one step towards the student; call this before the forward passes of each training step, as in MoCo."""
        follow(self.network, student, self.decay)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return shuffled(self.network, images, self.bn_parts)


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, momentum: float, buffers: bool = False) -> None:
    """average <- momentum * average + (1 - momentum) * network, for parameters. With ``buffers``, also for running
    statistics, and counts of batches are copied; without, each network keeps its own."""
    slow, fast = ([*x.parameters(), *(x.buffers() if buffers else ())] for x in (average, network))
    pairs = list(zip(slow, fast, strict=True))
    moving = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_(*map(list, zip(*moving, strict=True)), 1 - momentum)
    for count, new in pairs:
        if not count.is_floating_point():
            count.copy_(new)


@torch.no_grad()
def shuffled(encode: Callable[[Tensor], tuple[Tensor, ...]], images: Tensor, bn_parts: int) -> tuple[Tensor, ...]:
    """``encode(images)`` in the order of ``images``, computed on a batch that is shuffled across processes and split
    into parts.

    Query and key must not get batch statistics of the same images, or the network recognises the positive by these.
    MoCo shuffles the batch over 8 GPUs; fewer processes split their batches instead. ``bn_parts``: the number of parts
    over all processes; a process makes fewer if a part would have less than two images.
    """
    everything = all_gather(images)
    order = broadcast(send(torch.randperm(len(everything), device="cpu"), images.device))
    world = len(everything) // len(images)
    rank = torch.distributed.get_rank() if distributed() else 0
    mine = order.view(world, -1)[rank]
    # At least two images per part, because one image has no batch statistics.
    parts = everything[mine].tensor_split(max(1, min(bn_parts // world, len(mine) // 2)))
    outputs = [torch.cat(pieces) for pieces in zip(*map(encode, parts), strict=True)]
    back = torch.argsort(order).view(world, -1)[rank]
    return tuple(all_gather(output)[back] for output in outputs)
