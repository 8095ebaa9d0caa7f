"""A queue of a network's latest outputs over all processes, with which contrastive losses compare a batch.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.base import full_precision, unit
from runtime.device import all_gather, need_memory


class Queue(nn.Module):
    """A ring of ``size`` unit vectors of ``dim`` numbers, float32; 65,536 x 128 are 33.6 MB on each process.

    It begins with random directions, as in MoCo; :meth:`filled` tells them from real entries. Every process puts in
    the outputs of all, so all hold the same. Its buffers are part of a checkpoint, bit for bit.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        # peak while it is made: the draw, its norms and the quotient
        need_memory(3 * 4 * size * dim, f"--queue-size {size} of {dim} numbers each")
        self.register_buffer("items", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))  # ever put in, by all processes

    def __len__(self) -> int:
        return len(self.items)

    def similarities(self, z: Tensor) -> Tensor:
        """[b, dim] -> dot products with every item, [b, size]; later queue changes do not affect the gradient."""
        return z @ self.items.to(z.dtype, copy=True).T

    def filled(self) -> Tensor:
        """Which items were put in, bool [size]."""
        return torch.arange(len(self.items), device=self.count.device) < self.count

    @torch.no_grad()
    def put(self, z: Tensor) -> None:
        """The rows [b, dim] of all processes, in rank order, over the oldest items. A collective.

        A row that is not finite (half precision overflowed in this step) leaves the old item in its place.
        """
        z = all_gather(z.detach()).to(self.items.dtype)
        last = torch.arange(len(z), device=z.device)[-len(self):]  # if more than fit, keep the newest
        places = (self.count + last) % len(self)
        self.items[places] = torch.where(z[last].isfinite().all(1, keepdim=True), z[last], self.items[places])
        self.count += len(z)


def unit_rows(*outputs: Tensor) -> tuple[Tensor, ...]:
    """Each [b, d] with rows of length one, in full precision."""
    return tuple(unit(full_precision(x), 1) for x in outputs)


def info_nce(z: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """-log(exp(z.p / T) / (exp(z.p / T) + sum_j exp(z.n_j / T))), the batch's mean.

    ``z``, ``positive``: unit rows [b, d]; ``negatives``: the products z.n_j [b, K]. Returns the loss and the share of
    rows whose positive is nearer than every negative.
    """
    right = (z * positive).sum(1)                                                       # [b]
    loss = torch.logaddexp(right / temperature, (negatives / temperature).logsumexp(1)) - right / temperature
    return loss.mean(), (right > negatives.amax(1)).float().mean().detach()
