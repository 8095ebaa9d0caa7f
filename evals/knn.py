"""Weighted k-NN classification (Wu et al., CVPR 2018, section 3.4; the paper's k-NN columns)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.search import top_k

PAPER_ROWS = ((10, 0.07), (10, 1.0), (20, 0.07), (50, 0.07))  # (k, T) that the original code prints
CHUNK = 4096


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, num_classes: int,
                 rows: Sequence[tuple[int, float]] = PAPER_ROWS, device: torch.device | str = "cpu",
                 progress: bool = False) -> list[dict[str, float]]:
    """Top-1 and top-5 in percent of the weighted vote exp(cosine / T) of the k nearest, for each (k, T).

    ``train`` [n, d] and ``test`` [m, d] are features of any scale, labels int64 in [0, num_classes). One search
    serves all rows. Raises ValueError if some k exceeds n.
    """
    widest = max(k for k, _ in rows)
    similarity, neighbours = top_k(F.normalize(test, dim=1), F.normalize(train, dim=1), widest, device=device,
                                   label="k-NN", progress=progress)
    labels = train_labels[neighbours]                                           # [m, widest]
    return [{"k": k, "T": temperature, **_accuracy(similarity[:, :k], labels[:, :k], test_labels, num_classes,
                                                   temperature)} for k, temperature in rows]


def _accuracy(similarity: Tensor, labels: Tensor, truth: Tensor, num_classes: int, temperature: float,
              ) -> dict[str, float]:
    hits = torch.zeros(2, dtype=torch.int64)
    for start in range(0, len(truth), CHUNK):
        block = slice(start, start + CHUNK)
        weights = ((similarity[block].double() - similarity[block, :1].double()) / temperature).exp()
        votes = torch.zeros(len(weights), num_classes, dtype=torch.float64).scatter_add_(1, labels[block], weights)
        best = votes.topk(min(5, num_classes), dim=1).indices
        right = best == truth[block, None]
        hits += torch.stack([right[:, 0].sum(), right.any(1).sum()])
    top1, top5 = (100.0 * hits.double() / max(len(truth), 1)).tolist()
    return {"top1": top1, "top5": top5}
