"""The same search by faiss, if it is installed: an alternative backend, and a reference for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from runtime.packages import need_package
from search.exact import Block, Found

ROWS = 4096


def search_faiss() -> Callable[..., Iterator[Block]]:
    """A function with the arguments and results of :func:`search.exact.search`; raises :class:`UserError` without
    faiss.

    It works on the CPU, whatever ``device`` says, with a float32 copy of the bank in memory (``memory`` is ignored),
    and rows of equal score come in any order.
    """
    faiss = need_package("faiss-cpu", "--backend faiss", module="faiss", otherwise="leave the flag out")

    def search(queries: Tensor | None, bank: Tensor, k: int, *, rows: range | None = None, near: bool = True,
               far: bool = False, metric: str = "inner", memory: int | None = None, device: object = None,
               label: str = "search", progress: bool = False) -> Iterator[Block]:
        among_itself = queries is None
        if not 0 < k <= len(bank) - among_itself:
            raise ValueError(f"k = {k}, but there are {len(bank) - among_itself} rows to choose from")
        base = _prepared(bank, metric)
        measure = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        rows = range(len(bank) if among_itself else len(queries)) if rows is None else rows
        width = min(k + among_itself, len(bank))
        with tqdm(total=len(rows), desc=label, unit="row", unit_scale=True, leave=False,
                  disable=None if progress else True) as bar:
            for first in range(rows.start, rows.stop, ROWS):
                last = min(first + ROWS, rows.stop)
                asked = base[first:last] if among_itself else _prepared(queries[first:last], metric)
                own = np.arange(first, last) if among_itself else None
                found = [_without(own, *_knn(faiss, asked, base, width, measure, sign), k) if wanted else None
                         for wanted, sign in ((near, 1), (far, -1))]
                yield Block(first - rows.start, *found)
                bar.update(last - first)

    return search


def _knn(faiss: object, asked: np.ndarray, base: np.ndarray, width: int, measure: int, sign: int,
         ) -> tuple[np.ndarray, np.ndarray]:
    if sign > 0:
        return faiss.knn(asked, base, width, metric=measure)
    if measure == faiss.METRIC_INNER_PRODUCT:
        values, ids = faiss.knn(-asked, base, width, metric=measure)
        return -values, ids
    # The farthest x of q has the largest |x|² - 2 qx: an inner product of longer rows.
    longer = np.concatenate([base, (base**2).sum(1, keepdims=True)], axis=1)
    values, ids = faiss.knn(np.concatenate([-2 * asked, np.ones_like(asked[:, :1])], axis=1), longer, width,
                            metric=faiss.METRIC_INNER_PRODUCT)
    return values + (asked**2).sum(1, keepdims=True), ids


def _without(own: np.ndarray | None, values: np.ndarray, ids: np.ndarray, k: int) -> Found:
    if own is not None:
        keep = ids != own[:, None]
        keep[keep.all(1), -1] = False  # many copies may have pushed the row itself out of its own list
        values, ids = values[keep].reshape(len(ids), k), ids[keep].reshape(len(ids), k)
    return Found(torch.from_numpy(values), torch.from_numpy(ids))


def _prepared(features: Tensor, metric: str) -> np.ndarray:
    rows = features.cpu().float()
    return (F.normalize(rows, dim=1) if metric == "cosine" else rows).contiguous().numpy()
