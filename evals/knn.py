"""Weighted k-NN classification (Wu et al., CVPR 2018, section 3.4; the paper's k-NN columns)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from runtime.device import Process, gather_objects
from runtime.errors import UserError
from search.exact import Block, search

PAPER_ROWS = ((10, 0.07), (10, 1.0), (20, 0.07), (50, 0.07))  # (k, T) that the original code prints
CHUNK = 4096


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, num_classes: int,
                 rows: Sequence[tuple[int, float]] = PAPER_ROWS, device: torch.device | str = "cpu",
                 progress: bool = False, process: Process | None = None,
                 backend: Callable[..., Iterator[Block]] = search, **options: object) -> list[dict[str, float]]:
    """Top-1 and top-5 in percent of the weighted vote exp(cosine / T) of the k nearest, for each (k, T).

    ``train`` [n, d] and ``test`` [m, d] are features of any scale and float type, in memory or memory-mapped, labels
    int64 in [0, num_classes). One search by cosine serves all rows; ``backend`` is :func:`search.exact.search` or one
    like it, ``options`` are its own. With a ``process`` each rank takes its share of the test images and all return the
    score of all (a collective). Raises :class:`UserError` if some k exceeds n.
    """
    widest = max(k for k, _ in rows)
    if widest > len(train):
        raise UserError(f"k-NN: {widest} is more neighbours than the {len(train)} training images; give a smaller "
                        "--k, or more images")
    rank, ranks = (process.rank, process.world_size) if process else (0, 1)
    mine = range(len(test) * rank // ranks, len(test) * (rank + 1) // ranks)
    hits = torch.zeros(len(rows), 2, dtype=torch.int64)
    for block in backend(test, train, widest, rows=mine, metric="cosine", device=device, label="k-NN",
                         progress=progress, **options):
        similarity, neighbours = block.near
        first = mine.start + block.first
        truth, labels = test_labels[first:first + len(similarity)], train_labels[neighbours]   # [b], [b, widest]
        for number, (k, temperature) in enumerate(rows):
            hits[number] += _hits(similarity[:, :k], labels[:, :k], truth, num_classes, temperature)
    if process:
        hits = torch.stack(gather_objects(hits)).sum(0)
    percent = 100.0 * hits.double() / max(len(test), 1)
    return [{"k": k, "T": temperature, "top1": top1, "top5": top5}
            for (k, temperature), (top1, top5) in zip(rows, percent.tolist(), strict=True)]


def _hits(similarity: Tensor, labels: Tensor, truth: Tensor, num_classes: int, temperature: float) -> Tensor:
    """The number of votes with the true class first, and among the first five: int64 [2]."""
    hits = torch.zeros(2, dtype=torch.int64)
    for start in range(0, len(truth), CHUNK):
        block = slice(start, start + CHUNK)
        weights = ((similarity[block].double() - similarity[block, :1].double()) / temperature).exp()
        votes = torch.zeros(len(weights), num_classes, dtype=torch.float64).scatter_add_(1, labels[block], weights)
        best = votes.topk(min(5, num_classes), dim=1).indices
        right = best == truth[block, None]
        hits += torch.stack([right[:, 0].sum(), right.any(1).sum()])
    return hits
