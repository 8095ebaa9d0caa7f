"""Sums over a batch that is split across processes, with the gradients that one process with the batch would have."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.device import all_gather, all_reduce_sum, distributed

SCOPES = ("local", "global")


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's ``x`` (one shape), on every rank, and differentiable; ``x`` itself without processes.

    The backward pass differentiates the sum of the ranks' losses, so it sums gradients over ranks too. Once
    DistributedDataParallel has averaged them, the result is the gradient of the *mean* of the ranks' losses, which is
    the loss itself if all ranks have the same. A collective, forwards and backwards.
    """
    return _SumOverRanks.apply(x) if distributed() else x


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_gather(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient).chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(x: Tensor) -> Tensor:
    """Every rank's ``x`` [n, ...] (one shape) along dim 0 in rank order, on every rank, and differentiable.

    Gradients are those of the sum of the ranks' losses, see :func:`sum_over_ranks`. A collective both ways.
    """
    return _GatherRows.apply(x) if distributed() else x


class BatchStatistics:
    """Statistics over the rows of a batch: ``local``, this process's rows, or ``global``, those of all.

    With ``global``, a loss that uses such sums in the same way on every rank has the value, and after
    DistributedDataParallel the parameter gradients, of one process with the whole batch, even if ranks hold different
    numbers of rows. Only the sums are communicated, not the batch.
    """

    def __init__(self, scope: str = "local") -> None:
        if scope not in SCOPES:
            raise ValueError(f"scope {scope!r} is none of {', '.join(SCOPES)}")
        self.everywhere = scope == "global"

    def sums(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """Each [b, ...] summed over the rows to [...], all in one collective. Differentiable."""
        parts = [x.sum(0) for x in columns]
        if not (self.everywhere and distributed()):
            return tuple(parts)
        flat = sum_over_ranks(torch.cat([part.reshape(-1) for part in parts]))
        return tuple(x.view_as(part) for x, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True))

    def means(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """Each [b, ...] averaged over the rows to [...], all in one collective. Differentiable."""
        *totals, count = self.sums(*columns, columns[0].new_ones(len(columns[0])))
        return tuple(total / count for total in totals)

    def max(self, x: Tensor) -> Tensor:
        """The greatest of each column, [b, ...] to [...]. No gradient."""
        top = x.detach().amax(0)
        if self.everywhere and distributed():
            dist.all_reduce(top, dist.ReduceOp.MAX)
        return top
