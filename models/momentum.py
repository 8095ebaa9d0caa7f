"""Moving averages of a network: one to be saved beside it, and one that gives targets, with batch norm over shuffled
images.

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

ContrastedWidth = Annotated[int, Setting("width of the contrasted features; default {default}, MoCo's", "--moco-dim",
                                         least=1, metavar="D")]
Momentum = Annotated[float, Setting("momentum of the copy that follows the network; default {default}, MoCo's",
                                    "--moco-m", least=0, below=1, metavar="M")]
BatchNormParts = Annotated[int, Setting(
    "parts over all processes into which the shuffled batch of the momentum copy is split for batch norm, so that its "
    "statistics do not reveal the positive; default {default}, as on MoCo's 8 GPUs", "--bn-parts", least=1,
    metavar="N")]


class MovingAverage(nn.Module):
    """A copy of a network that follows it and never trains, with its running statistics: the weights to save."""

    def __init__(self, network: nn.Module, ema: Annotated[float, Setting(
            "keep a moving average of the student with this decay (0.999, 0.9999) and write it to student_ema.pth; "
            "default {default}, none", least=0, below=1, metavar="X")]) -> None:
        super().__init__()
        self.network, self.decay = copy.deepcopy(network).requires_grad_(False), ema

    def update(self, network: nn.Module) -> None:
        """One step towards ``network``, after an update of it."""
        follow(self.network, network, self.decay, buffers=True)


class MomentumStudent(MovingAverage):
    """A moving average with batch-norm statistics of its own: uint8 images [b, 3, H, W] to its outputs [b, d]."""

    def __init__(self, student: nn.Module, momentum: float = 0.999, bn_parts: int = 8) -> None:
        super().__init__(student, momentum)
        self.bn_parts = bn_parts

    def update(self, student: nn.Module) -> None:
        """One step towards the student; before the forward passes of each training step, as in MoCo."""
        follow(self.network, student, self.decay)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return shuffled(self.network, images, self.bn_parts)


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, momentum: float, buffers: bool = False) -> None:
    """average <- momentum * average + (1 - momentum) * network, for parameters; with ``buffers`` for running statistics
    too, and counts of batches are taken over. Without it each network keeps its own."""
    slow, fast = ([*x.parameters(), *(x.buffers() if buffers else ())] for x in (average, network))
    pairs = list(zip(slow, fast, strict=True))
    moving = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_(*map(list, zip(*moving, strict=True)), 1 - momentum)
    for count, new in pairs:
        if not count.is_floating_point():
            count.copy_(new)


@torch.no_grad()
def shuffled(encode: Callable[[Tensor], tuple[Tensor, ...]], images: Tensor, bn_parts: int) -> tuple[Tensor, ...]:
    """``encode(images)`` in their order, computed over a batch that is shuffled across processes and cut into parts.

    ``bn_parts``: the number of parts over all processes. The query's and the key's batch statistics must not come
    from the same images, or the network recognises its positive by them; MoCo has 8 GPUs; a single process splits its
    batch instead.
    """
    everything = all_gather(images)
    order = broadcast(send(torch.randperm(len(everything), device="cpu"), images.device))
    world = len(everything) // len(images)
    rank = torch.distributed.get_rank() if distributed() else 0
    mine = order.view(world, -1)[rank]
    # A part of one image has no batch statistics.
    parts = everything[mine].tensor_split(max(1, min(bn_parts // world, len(mine) // 2)))
    outputs = [torch.cat(pieces) for pieces in zip(*map(encode, parts), strict=True)]
    back = torch.argsort(order).view(world, -1)[rank]
    return tuple(all_gather(output)[back] for output in outputs)
