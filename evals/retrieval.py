"""Retrieval: the revisited Oxford and Paris protocol, and finding images of a query's own class in any labelled set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from runtime.device import Process, gather_objects
from search.products import Bank

PROTOCOLS = {"easy": (("easy",), ("junk", "hard")), "medium": (("easy", "hard"), ("junk",)),
             "hard": (("hard",), ("junk", "easy"))}  # what must be found, and what is ignored
PRECISION_AT = (1, 5, 10)
RECALL_AT = (1, 2, 4, 8)
SCORES = {"cpu": 2 << 20, "cuda": 32 << 20}  # at a time


class Describe(nn.Module):
    """Images uint8 [b, 3, H, W] of any size to descriptors [b, d] of length 1: the mean over ``scales`` of ``trunk``'s
    features of length 1, images resized bilinearly, as in Radenovic et al., TPAMI 2018, section 4.3.

    ``normalise``: uint8 images to what ``trunk`` takes. ``backbone`` says what the features are of.
    """

    def __init__(self, normalise: nn.Module, trunk: nn.Module, scales: Sequence[float], backbone: nn.Module) -> None:
        super().__init__()
        self.normalise, self.trunk, self.scales, self.backbone = normalise, trunk, tuple(scales), backbone

    def forward(self, images: Tensor) -> Tensor:
        whole, total = self.normalise(images), 0.0
        for scale in self.scales:
            scaled = whole if scale == 1 else F.interpolate(whole, scale_factor=scale, mode="bilinear",
                                                            align_corners=False)
            total = total + F.normalize(self.trunk(scaled).float(), dim=1)
        return F.normalize(total, dim=1)


def revisited(scores: Tensor, truth: Sequence[Mapping[str, Sequence[int]]], at: Sequence[int] = PRECISION_AT,
              ) -> dict[str, dict[str, float]]:
    """mAP and mP@k in percent of the easy, medium and hard protocols of revisited Oxford and Paris.

    Radenovic et al., "Revisiting Oxford and Paris: Large-Scale Image Retrieval Benchmarking", CVPR 2018, section 3.
    ``scores`` [q, n] of each database image for each query, higher is nearer; equal ones rank in the database's order.
    ``truth``: the numbers of the ``easy``, ``hard`` and ``junk`` images of each query. A query without any image to be
    found under a protocol does not count there; ``queries`` says how many did (with none, the scores are NaN).
    """
    order = scores.argsort(dim=1, descending=True, stable=True).cpu().numpy()
    found = {}
    for name, (wanted, ignored) in PROTOCOLS.items():
        rows = []
        for ranking, groups in zip(order, truth, strict=True):
            positive = np.concatenate([np.asarray(groups[x], dtype=np.int64) for x in wanted])
            if len(positive):
                junk = np.concatenate([np.asarray(groups[x], dtype=np.int64) for x in ignored])
                hits = np.flatnonzero(np.isin(ranking[~np.isin(ranking, junk)], positive))
                rows.append([trapezoidal_ap(hits, len(positive)), *(precision_at(hits, k) for k in at)])
        means = 100 * np.mean(rows, axis=0) if rows else np.full(1 + len(at), np.nan)
        found[name] = {**dict(zip(["mAP", *(f"mP@{k}" for k in at)], means.tolist(), strict=True)),
                       "queries": len(rows)}
    return found


def trapezoidal_ap(hits: np.ndarray, positives: int) -> float:
    """Area under the precision-recall curve by trapezoids, as the Oxford buildings' own code measures it.

    ``hits`` int64 [p]: ranks from 0, ascending, of the positives that were ranked; ``positives``: how many there are.
    """
    count = np.arange(len(hits))
    before = np.where(hits > 0, count / np.maximum(hits, 1), 1.0)
    after = (count + 1) / (hits + 1)
    return float(((before + after) / 2).sum() / positives)


def precision_at(hits: np.ndarray, k: int) -> float:
    """Share of positives among the first ``k``; a query with its last positive before k is measured there."""
    if not len(hits):
        return 0.0
    k = min(int(hits.max()) + 1, k)
    return float((hits < k).sum() / k)


def class_retrieval(queries: Tensor, query_labels: Tensor, database: Tensor | None, labels: Tensor | None,
                    process: Process, at: Sequence[int] = RECALL_AT, progress: bool = False) -> dict[str, float]:
    """Recall@k and mAP in percent of finding, by cosine, the images of each query's class.

    Features [q, d] and [n, d] with int64 labels; ``database`` None: each query is searched among the other queries.
    Recall@k is the share of queries with an image of their class among the k nearest (Jegou et al., TPAMI 2011); equal
    cosines rank in the database's order. AP is not interpolated, and images of equal cosine count together, as in
    scikit-learn's average_precision_score. Queries whose class has no (other) image there do not count;
    ``without_answer`` says how many. Each rank does its share and all return the same (a collective).
    """
    alone = database is None
    database, labels = (queries, query_labels) if alone else (database, labels)
    bank = Bank(database, "cosine", "float32", process.device, room=database.numel() * 4)
    asked = bank if alone else Bank(queries, "cosine", "float32", process.device, room=0)
    n, count = len(bank), len(queries)
    mine = range(count * process.rank // process.world_size, count * (process.rank + 1) // process.world_size)
    labels, query_labels = labels.to(process.device), query_labels.to(process.device)
    step = max(1, SCORES[process.device.type] // n)
    buffer = torch.empty(step * n, device=process.device)
    sums = torch.zeros(2 + len(at), dtype=torch.float64)  # queries that count, AP, recall at each k
    with tqdm(total=len(mine), desc="retrieval", unit="query", leave=False, disable=None if progress else True) as bar:
        for first in range(mine.start, mine.stop, step):
            rows = slice(first, min(first + step, mine.stop))
            scores = bank.score(asked.take(rows), bank.take(slice(None)), buffer)
            if alone:
                scores[torch.arange(len(scores)), torch.arange(rows.start, rows.stop)] = -torch.inf
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            relevant = (labels[order] == query_labels[rows, None]) & (scores > -torch.inf)
            sums += _sums(scores, relevant, at).cpu()
            bar.update(len(scores))
    counted, ap, *recall = torch.stack(gather_objects(sums)).sum(0).tolist()
    share = 100 / counted if counted else float("nan")
    return {"mAP": ap * share, **{f"recall@{k}": x * share for k, x in zip(at, recall, strict=True)},
            "queries": int(counted), "without_answer": count - int(counted)}


def _sums(scores: Tensor, relevant: Tensor, at: Sequence[int]) -> Tensor:
    """Of sorted scores [b, n] and what is relevant [b, n]: rows with any, the sum of their AP, hits at each k."""
    found = relevant.cumsum(1)                                           # [b, n]
    total = found[:, -1]
    hits = [(found[:, min(k, found.shape[1]) - 1] > 0).sum() for k in at]
    return torch.stack([(total > 0).sum(), average_precision(scores, relevant).nan_to_num().sum(), *hits]).double()


def average_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """AP float64 [b] of descending ``scores`` [b, n] and ``relevant`` bool [b, n]; NaN where nothing is relevant.

    The sum over distinct scores of (recall there - recall before) times precision there.
    """
    places = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    found = relevant.cumsum(1)
    last = torch.ones_like(relevant)                                     # of those with the same score
    last[:, :-1] = scores[:, :-1] != scores[:, 1:]
    # what had been found at the last place of the score before: counts only grow, so a running maximum carries it on
    carried = torch.where(last, found, 0).cummax(1).values
    before = torch.zeros_like(found)
    before[:, 1:] = carried[:, :-1]
    gains = torch.where(last, (found - before) * (found.double() / places), 0.0)
    return gains.sum(1) / found[:, -1]
