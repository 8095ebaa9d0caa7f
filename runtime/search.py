"""Exact nearest (and farthest) neighbours by inner product, a block of queries at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

BLOCK_BYTES = 256 << 20  # of similarities held at a time


@torch.inference_mode()
def top_k(queries: Tensor, bank: Tensor, k: int, *, self_offset: int | None = None, largest: bool = True,
          device: torch.device | str = "cpu", label: str = "search", progress: bool = False,
          ) -> tuple[Tensor, Tensor]:
    """The ``k`` rows of ``bank`` [n, d] with the largest (or smallest) inner product with each of ``queries`` [q, d].

    ``self_offset``: query i is row ``self_offset + i`` of the bank and is left out by that identity, wherever its
    copies rank. Returns values float32 [q, k], best first, and indices int64 [q, k], both on the CPU.
    Raises ValueError if the bank has fewer than ``k`` rows to give.
    """
    available = len(bank) - (self_offset is not None)
    if not 0 < k <= available:
        raise ValueError(f"k = {k}, but there are {available} rows to choose from")
    bank = bank.to(device)
    rows = max(1, BLOCK_BYTES // (4 * len(bank)))
    worst = -torch.inf if largest else torch.inf
    values = torch.empty(len(queries), k)
    indices = torch.empty(len(queries), k, dtype=torch.int64)
    with tqdm(total=len(queries), desc=label, unit="row", leave=False, disable=None if progress else True) as bar:
        for start in range(0, len(queries), rows):
            block = queries[start:start + rows].to(device)
            similarity = block @ bank.T                                        # [rows, n]
            if self_offset is not None:
                own = torch.arange(len(block), device=similarity.device)
                similarity[own, self_offset + start + own] = worst
            top = similarity.topk(k, dim=1, largest=largest, sorted=True)
            values[start:start + rows], indices[start:start + rows] = top.values.cpu(), top.indices.cpu()
            bar.update(len(block))
    return values, indices
