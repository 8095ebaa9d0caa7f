"""k-means over rows that the ranks share, Euclidean or spherical, by Lloyd's passes or by mini-batches.

Every random choice uses global row numbers and its own generator, and sums over ranks are in float64, so that any
number of ranks gives the same clusters up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from runtime.device import Process, all_reduce_sum, gather_objects, send
from runtime.settings import Setting

METRICS = ("euclidean", "cosine")
INITS = ("k-means++", "random")
CHUNK_BYTES = 256 << 20  # of rows and scores held on the device at a time
MINIMUM_SAMPLE = 10_000  # rows out of which k-means++ draws, or 3 a cluster where that is more
FINISHING_PASSES = 5  # of Lloyd's after mini-batches: they re-seed empty clusters and settle the centres

Metric = Annotated[str, Setting(
    "on L2-normalised features: euclidean (default, the original's) or cosine, whose centres have length 1 too "
    "(spherical k-means)", choices=METRICS, basic=True)]
Init = Annotated[str | Tensor, Setting(
    "first centres: spread-out images (k-means++, default) or random ones, as in the original", choices=INITS,
    basic=True)]
Passes = Annotated[int, Setting(
    "passes over the features at most; default {default}, the original's", least=1, metavar="N", basic=True)]
Tolerance = Annotated[float, Setting(
    "stop when a pass improves the objective by at most this share; default {default}", least=0, metavar="X",
    basic=True)]
BatchRows = Annotated[int, Setting(
    "update the centres after every N features, and pass over all only at the end: for millions of images on a "
    "CPU, with --tolerance 1e-3; default 0, never", "--mini-batch", least=0, metavar="ROWS", basic=True)]


@dataclass(frozen=True)
class Clustering:
    """centres: float32 [K, d] on the CPU. labels: int64 [n] on the CPU, the nearest centre of each of this rank's
    rows. objective: the mean squared distance of all rows to their centres, halved (which is 1 - cosine) for
    'cosine'. passes: over the rows. converged: whether it stopped by itself. sizes: int64 [K], rows per cluster."""

    centres: Tensor
    labels: Tensor
    objective: float
    passes: int
    converged: bool
    sizes: Tensor


@torch.inference_mode()
def kmeans(rows: Tensor, num_clusters: int, process: Process, *, metric: Metric = "euclidean", unit_rows: bool = False,
           init: Init = "k-means++", passes: Passes = 150, tolerance: Tolerance = 1e-6, batch_rows: BatchRows = 0,
           seed: int = 0, progress: bool = False) -> Clustering:
    """Cluster the rows [n, d] of all ranks, which follow one another in rank order; n may differ and may be 0.

    ``metric``: 'euclidean' (Lloyd 1982), or 'cosine' for the spherical one (Dhillon and Modha 2001), which looks at
    rows and centres at length 1; ``unit_rows`` brings the rows alone to length 1. ``init``: 'k-means++' (Arthur and
    Vassilvitskii 2007, the best of a few draws each time, over a sample of the rows where there are many), 'random'
    rows, or centres [K, d]. It stops after ``passes``, when no label changes, or when the objective falls by no more
    than ``tolerance`` of itself. ``batch_rows`` > 0: mini-batches of so many rows (Sculley 2010) until a pass brings no
    more than that, then a few of Lloyd's. A cluster that loses its last row starts again at the row farthest from its
    centre. Rows are float of any precision, on any device; products are float32 on ``process.device``. Raises
    ValueError for unknown names and for more clusters than rows.
    """
    if metric not in METRICS or (isinstance(init, str) and init not in INITS):
        raise ValueError(f"metric is one of {METRICS} and init one of {INITS}, not {metric!r} and {init!r}")
    shared = _SharedRows(rows, process, unit_rows, spherical=metric == "cosine")
    if not 0 < num_clusters <= shared.total:
        raise ValueError(f"{num_clusters} clusters of {shared.total} rows")
    generator = torch.Generator().manual_seed(seed)
    centres = (shared.to_centres(init.to(process.device, torch.float32)) if isinstance(init, Tensor)
               else _start(shared, num_clusters, init, generator))
    with tqdm(total=passes, desc="k-means", unit="pass", leave=False, disable=None if progress else True) as bar:
        done = 0
        if batch_rows:
            centres, done = _mini_batches(shared, centres, passes, tolerance, batch_rows, generator, bar)
            passes = FINISHING_PASSES
        return _lloyd(shared, centres, passes, tolerance, bar, done)


class _SharedRows:
    """The rows of all ranks: this rank's directly, any others by their global number."""

    def __init__(self, rows: Tensor, process: Process, unit: bool, spherical: bool) -> None:
        counts = gather_objects(len(rows))
        if process.device.type == "cuda" and rows.nbytes < torch.cuda.mem_get_info(process.device)[0] / 2:
            rows = rows.to(process.device)  # once, rather than chunk by chunk in each pass
        self.rows, self.device, self.unit, self.spherical = rows, process.device, unit or spherical, spherical
        self.first, self.total = sum(counts[:process.rank]), sum(counts)

    def prepare(self, rows: Tensor) -> Tensor:
        rows = rows.to(self.device, torch.float32)
        return F.normalize(rows, dim=1) if self.unit else rows

    def to_centres(self, means: Tensor) -> Tensor:
        return F.normalize(means, dim=1) if self.spherical else means

    def chunks(self, num_clusters: int) -> Iterator[Tensor]:
        size = max(1, CHUNK_BYTES // (4 * (num_clusters + 2 * self.rows.shape[1])))
        yield from (self.prepare(chunk) for chunk in self.rows.split(size) if len(chunk))

    def mine(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Among global row numbers [m], on the CPU: the positions of this rank's rows, and these rows."""
        places = torch.nonzero((numbers >= self.first) & (numbers < self.first + len(self.rows))).flatten()
        return places, self.prepare(self.rows[(numbers[places] - self.first).to(self.rows.device)])

    def fetch(self, numbers: Tensor) -> Tensor:
        """The rows [m, d] with these global numbers, the same bits on every rank."""
        found = torch.zeros(len(numbers), self.rows.shape[1], device=self.device)
        places, rows = self.mine(numbers)
        found[places.to(self.device)] = rows
        return all_reduce_sum(found)


def _start(shared: _SharedRows, count: int, init: str, generator: torch.Generator) -> Tensor:
    order = torch.randperm(shared.total, generator=generator)
    if init == "random":
        return shared.fetch(order[:count])
    return _plus_plus(shared.fetch(order[:max(3 * count, MINIMUM_SAMPLE)]), count, generator)


def _plus_plus(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Each centre is a row drawn with probability proportional to its squared distance from those before it, the
    best of a few draws (as in scikit-learn); the first is rows[0]."""
    norms = rows.square().sum(dim=1)
    nearest = torch.full_like(norms, torch.inf)  # squared distance of each row to its nearest centre so far
    candidates, chosen, tries = torch.zeros(1, dtype=torch.int64, device=rows.device), [], 2 + int(math.log(count))
    shares = send(torch.rand(count, tries, dtype=torch.float64, generator=generator), rows.device)
    for share in shares:  # nothing here waits for the device, as a 0-d index would
        squared = norms + norms[candidates, None] - 2 * (rows[candidates] @ rows.T)            # [tries, s]
        squared = torch.minimum(squared.clamp(min=0), nearest)
        best = squared.sum(dim=1, dtype=torch.float64).argmin(dim=0, keepdim=True)                      # [1]
        chosen.append(candidates[best])
        nearest = squared[best][0]
        nearest[chosen[-1]] = 0  # rounding must not let a row be drawn twice
        mass = nearest.double().cumsum(dim=0)
        # If all mass is gone, the remaining rows are copies of centres, so take the last.
        candidates = torch.searchsorted(mass, share * mass[-1], right=True).clamp(max=len(rows) - 1)
    return rows[torch.cat(chosen)]


def _nearest(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre int64 [m] of each row, and the squared distance to it."""
    labels = (rows @ centres.T).sub_(centres.square().sum(dim=1) / 2).argmax(dim=1)
    return labels, (rows - centres[labels]).square().sum(dim=1)


class _Sums:
    """Per cluster the sum float64 [K, d] of its rows and their number; over all rows the sum of the distances."""

    def __init__(self, centres: Tensor) -> None:
        self.table = torch.zeros(len(centres), centres.shape[1] + 2, dtype=torch.float64, device=centres.device)

    def add(self, rows: Tensor, labels: Tensor, squared: Tensor) -> None:
        columns = torch.cat([rows, torch.ones_like(squared)[:, None], squared[:, None]], dim=1)
        self.table.index_add_(0, labels, columns.double())

    def over_ranks(self) -> tuple[Tensor, Tensor, float]:
        table = all_reduce_sum(self.table)
        return table[:, :-2], table[:, -2], float(table[:, -1].sum())


def _assign(shared: _SharedRows, centres: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """One pass: labels [n] and squared distances [n] of this rank's rows; sums, counts and objective of all rows."""
    sums, labels, squared = _Sums(centres), [], []
    for rows in shared.chunks(len(centres)):
        nearest, distances = _nearest(rows, centres)
        sums.add(rows, nearest, distances)
        labels.append(nearest)
        squared.append(distances)
    totals, counts, cost = sums.over_ranks()
    joined = torch.empty(0, dtype=torch.int64), torch.empty(0)
    if labels:
        joined = torch.cat(labels).cpu(), torch.cat(squared).cpu()  # once a pass, not once a chunk
    return *joined, totals, counts, cost / shared.total / (2 if shared.spherical else 1)


def _lloyd(shared: _SharedRows, centres: Tensor, passes: int, tolerance: float, bar: tqdm, done: int) -> Clustering:
    labels, squared, sums, counts, objective = _assign(shared, centres)
    converged = False
    for _ in range(passes):
        centres = _means(shared, centres, sums, counts)
        reseeded = _reseed(shared, centres, counts, squared)
        before, last = labels, objective
        labels, squared, sums, counts, objective = _assign(shared, centres)
        done += 1
        bar.update()
        bar.set_postfix(objective=f"{objective:.6g}", refresh=False)
        same = all(gather_objects(bool(torch.equal(before, labels))))
        if not reseeded and (same or last - objective <= tolerance * last):
            converged = True
            break
    return Clustering(centres.cpu(), labels, objective, done, converged, counts.long().cpu())


def _means(shared: _SharedRows, centres: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    """New centres; a cluster without rows, or whose rows cancel out, keeps its own."""
    means = (sums / counts.clamp(min=1)[:, None]).float()
    usable = (counts > 0) & (means.norm(dim=1) > 0) if shared.spherical else counts > 0
    return shared.to_centres(torch.where(usable[:, None], means, centres))


def _reseed(shared: _SharedRows, centres: Tensor, counts: Tensor, squared: Tensor) -> bool:
    """Move the centres of empty clusters, in place, to the rows farthest from their centres; return whether any moved.
    """
    empty = torch.nonzero(counts == 0).flatten()
    if not len(empty):
        return False
    farthest = squared.sort(descending=True, stable=True)
    mine = zip(*(x[:len(empty)].tolist() for x in (farthest.values, farthest.indices + shared.first)), strict=True)
    best = sorted((entry for entries in gather_objects(list(mine)) for entry in entries if entry[0] > 0),
                  key=lambda entry: (-entry[0], entry[1]))[:len(empty)]
    if best:
        centres[empty[:len(best)]] = shared.fetch(torch.tensor([number for _, number in best]))
    return bool(best)


def _mini_batches(shared: _SharedRows, centres: Tensor, passes: int, tolerance: float, batch_rows: int,
                  generator: torch.Generator, bar: tqdm) -> tuple[Tensor, int]:
    """Each centre is the running mean of the rows that were ever assigned to it. Returns centres and passes done."""
    given = torch.zeros(len(centres), 1, dtype=torch.float64, device=centres.device)
    last = torch.inf
    for done in range(1, passes + 1):
        cost = 0.0
        for numbers in torch.randperm(shared.total, generator=generator).split(batch_rows):
            sums = _Sums(centres)
            _, rows = shared.mine(numbers)
            sums.add(rows, *_nearest(rows, centres))
            totals, counts, part = sums.over_ranks()
            given += counts[:, None]
            moved = (centres + (totals - counts[:, None] * centres) / given.clamp(min=1)).float()
            centres = shared.to_centres(moved)
            cost += part
        bar.update()
        if last - cost <= tolerance * last and done > 1:
            break
        last = cost
    return centres, done
