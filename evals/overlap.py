"""How well a student's feature space agrees with its teacher's, measured without labels.

Neighbourhoods (shared nearest neighbours, trustworthiness and continuity) and linear CKA compare spaces of any widths.
The losses' own measures (cosines of rows and of columns) compare features of one width, after the student's head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import trange

from evals.sanity import entropy_rank
from runtime.device import Process, all_reduce_sum, gather_objects
from search.candidates import EMPTY, encode
from search.exact import top_k
from search.products import Bank

KS = (1, 5, 11, 21, 31, 51, 101)  # of neighbours, as many as fit
ROWS = 4096                       # at a time where each takes little
SCORES = {"cpu": 2 << 20, "cuda": 64 << 20}  # at a time where each row takes a score an image


def usable_ks(images: int, ks: Sequence[int] = KS) -> list[int]:
    """Those of ``ks`` for which trustworthiness is defined, below half of the images."""
    return [k for k in sorted(set(ks)) if 2 * k < images]


def shared_neighbours(teacher: Tensor, student: Tensor, ks: Sequence[int] = KS, **options: object) -> dict[int, float]:
    """Percent of the ``k`` nearest other images, by cosine, that an image has in both spaces, averaged over images.

    Features [n, d_t] and [n, d_s] of the same images; ``options`` are those of search.exact.search. By chance it is
    100 k / (n - 1). Raises ValueError if some k exceeds n - 1.
    """
    near = [nearest(space, range(len(space)), max(ks), **options) for space in (teacher, student)]
    return {k: 100 * count / (k * len(teacher)) for k, count in _shared(*near, ks).items()}


def neighbourhoods(teacher: Tensor, student: Tensor, ks: Sequence[int], process: Process,
                   progress: bool = False) -> dict[str, dict[int, float]]:
    """``shared`` neighbours in percent (:func:`shared_neighbours`), ``trustworthiness`` and ``continuity``, for each k.

    The last two are of Venna and Kaski, "Neighborhood preservation in nonlinear projection methods", ICANN 2001, by
    cosine. Trustworthiness penalises images among the student's k nearest, but not the teacher's, by how far they rank
    beyond k in the teacher's space; continuity the reverse. Scaled so that 1 is perfect and one half about chance.
    Features [n, d_t] and [n, d_s] in memory or memory-mapped; each rank does its share of the images and
    all return the scores (a collective). Raises ValueError if some k is not below n / 2.
    """
    n, widest = len(teacher), max(ks)
    if 2 * widest >= n:
        raise ValueError(f"k = {widest} of {n} images, and trustworthiness is defined for k below half of them")
    mine = range(n * process.rank // process.world_size, n * (process.rank + 1) // process.world_size)
    options = {"device": process.device, "progress": progress}
    near = [nearest(space, mine, widest, label=label, **options)
            for space, label in ((teacher, "teacher's neighbours"), (student, "student's neighbours"))]
    sums = [[float(x) for x in _shared(*near, ks).values()]]
    for space, ids in ((teacher, near[1]), (student, near[0])):
        ranks = ranks_of(ids, space, mine, process.device, progress)
        sums.append([float((ranks[:, :k] - k).clamp_min(0).sum()) for k in ks])
    shared, intruders, missing = torch.tensor(gather_objects(sums), dtype=torch.float64).sum(0).tolist()
    worst = [n * k * (2 * n - 3 * k - 1) / 2 for k in ks]
    return {"shared": {k: 100 * x / (k * n) for k, x in zip(ks, shared, strict=True)},
            "trustworthiness": {k: 1 - x / most for k, x, most in zip(ks, intruders, worst, strict=True)},
            "continuity": {k: 1 - x / most for k, x, most in zip(ks, missing, worst, strict=True)}}


def nearest(space: Tensor, rows: range, k: int, **options: object) -> Tensor:
    """int64 [len(rows), k]: the ``k`` nearest others by cosine of these rows of ``space`` [n, d], nearest first."""
    if not len(rows):
        return torch.empty(0, k, dtype=torch.int64)
    return top_k(space[rows.start:rows.stop], space, k, self_offset=rows.start, metric="cosine", **options)[1]


def _shared(first: Tensor, second: Tensor, ks: Sequence[int]) -> dict[int, int]:
    """For each k how many of the first k ids of a row of ``first`` [m, K] are among those of ``second`` [m, K]."""
    counts = dict.fromkeys(ks, 0)
    places = torch.arange(first.shape[1])
    needed = torch.maximum(places[:, None], places[None])  # an id at places i and j is shared from k = max(i, j) + 1 on
    for start in range(0, len(first), 256):
        rows = slice(start, start + 256)
        last = needed.expand(len(first[rows]), -1, -1)[first[rows, :, None] == second[rows, None, :]]
        for k in ks:
            counts[k] += int((last < k).sum())
    return counts


def ranks_of(ids: Tensor, space: Tensor, rows: range, device: torch.device, progress: bool = False) -> Tensor:
    """Rank, from 1, of images ``ids`` int64 [len(rows), k] among all the others by cosine to each of ``rows``.

    ``space`` [n, d]; ``ids`` never include the row itself. Ties rank in the order of the images, as in search.exact.
    Returns int64 [len(rows), k]. No more than a few million scores are held at a time.
    """
    bank = Bank(space, "cosine", "float32", device, room=space.numel() * 4)
    everyone, ranks = torch.arange(len(bank), device=device), torch.empty_like(ids)
    step = max(1, SCORES[device.type] // len(bank))
    buffer = torch.empty(step * len(bank), device=device)
    for first in trange(0, len(rows), step, desc="ranks", unit="block", leave=False,
                        disable=None if progress else True):
        block = range(rows.start + first, min(rows.start + first + step, rows.stop))
        scores = bank.score(bank.take(slice(block.start, block.stop)), bank.take(slice(None)), buffer)
        keys = encode(scores, everyone)                              # [b, n], descending: nearer first
        asked, order = keys.gather(1, ids[first:first + len(block)].to(device)).sort(dim=1)
        keys[torch.arange(len(block)), torch.arange(block.start, block.stop)] = EMPTY  # the image itself
        # how many of the asked lie below each key; from the count of each such number follows how many are nearer
        below = torch.searchsorted(asked, keys)                      # [b, n] in 0 … k
        width = asked.shape[1] + 1
        below += torch.arange(0, len(block) * width, width, device=device)[:, None]
        counts = torch.bincount(below.flatten(), minlength=len(block) * width).view(len(block), width)
        nearer = counts.flip(1).cumsum(1).flip(1)[:, 1:]
        ranks[first:first + len(block)] = (nearer + 1).gather(1, order.argsort(dim=1)).cpu()
    return ranks


def similarity(teacher: Tensor, student: Tensor, projected: Tensor | None, process: Process,
               target: Tensor | None = None) -> dict[str, float | None]:
    """Global similarity of the two spaces, from features [n, d_t] and [n, d_s] of the same images.

    ``cka``: linear centred kernel alignment (Kornblith et al., ICML 2019, equation 4), in [0, 1].
    ``cka_unbiased``: the same of the unbiased estimate of HSIC (Song et al., JMLR 2012, equation 5), which does not
    rise with the width where images are few; about 0 for spaces that have nothing in common.
    ``effective_rank``, ``teacher_effective_rank``: see evals.sanity.effective_rank.
    Of ``projected`` [n, d], the student's features where the loss saw them, beside ``target`` [n, d], what it compared
    them with (None: the teacher's features); where ``projected`` is None, so are these:
    ``row_cosine``: mean cosine of the images' rows; ``space_cosine``: mean cosine of the columns (the paper's space
    similarity, over all images as one batch); ``dimension_correlation``: the same of centred columns, Pearson's.
    Sums are in float64 and over all ranks (a collective), no more than a few thousand rows at a time.
    """
    n = len(teacher)
    if n < 4:
        raise ValueError(f"{n} images; the unbiased estimate needs 4")
    mine = range(n * process.rank // process.world_size, n * (process.rank + 1) // process.world_size)
    means = [sum_over(mine, process, lambda rows, x=x: rows_of(x, rows, process).sum(0)) / n
             for x in (teacher, student)]

    def products(rows: slice) -> Tensor:
        t, s = (rows_of(x, rows, process) - mean for x, mean in zip((teacher, student), means, strict=True))
        lengths_t, lengths_s = t.square().sum(1), s.square().sum(1)
        whole = torch.stack([lengths_t @ lengths_s, lengths_t @ lengths_t, lengths_s @ lengths_s,
                             lengths_t.sum(), lengths_s.sum()])
        return torch.cat([(t.T @ s).flatten(), (t.T @ t).flatten(), (s.T @ s).flatten(), whole])

    d_t, d_s = teacher.shape[1], student.shape[1]
    total = sum_over(mine, process, products)
    ts, tt, ss, whole = total.split([d_t * d_s, d_t * d_t, d_s * d_s, 5])
    ranks = [entropy_rank(torch.linalg.eigvalsh(x.view(d, d)).clamp_min(0).sqrt()) for x, d in ((tt, d_t), (ss, d_s))]
    norms = [x.square().sum() for x in (ts, tt, ss)]
    r_ts, r_tt, r_ss, sum_t, sum_s = whole
    unbiased = [_hsic(*x, n) for x in ((norms[0], r_ts, sum_t, sum_s), (norms[1], r_tt, sum_t, sum_t),
                                       (norms[2], r_ss, sum_s, sum_s))]
    found = {"cka": _ratio(*norms), "cka_unbiased": _ratio(*unbiased),
             "effective_rank": ranks[1], "teacher_effective_rank": ranks[0]}
    return {**found, **cosines(teacher if target is None else target, projected, process)}


def cosines(teacher: Tensor, projected: Tensor | None, process: Process) -> dict[str, float | None]:
    """The last three of :func:`similarity`. A row or column of zeros has cosine 0 with everything."""
    names = ("row_cosine", "space_cosine", "dimension_correlation")
    if projected is None:
        return dict.fromkeys(names)
    n, d = teacher.shape
    mine = range(n * process.rank // process.world_size, n * (process.rank + 1) // process.world_size)

    def both(rows: slice) -> tuple[Tensor, Tensor]:
        return rows_of(teacher, rows, process), rows_of(projected, rows, process)

    def first(rows: slice) -> Tensor:
        t, s = both(rows)
        return torch.cat([t.sum(0), s.sum(0), *_columns(t, s), torch.cosine_similarity(t, s).sum()[None]])

    def second(rows: slice) -> Tensor:
        t, s = both(rows)
        return torch.cat(_columns(t - mean_t, s - mean_s))

    sum_t, sum_s, ts, tt, ss, row = sum_over(mine, process, first).split([d] * 5 + [1])
    mean_t, mean_s = sum_t / n, sum_s / n
    centred = sum_over(mine, process, second).split(d)
    tiny = torch.finfo(torch.float32).eps ** 2  # a column that only rounding moves is constant
    alive = (centred[1] > tiny * tt) & (centred[2] > tiny * ss)
    correlation = torch.where(alive, centred[0] / (centred[1] * centred[2]).sqrt(), 0.0)
    cosine = torch.where((tt > 0) & (ss > 0), ts / (tt * ss).sqrt(), 0.0)
    return dict(zip(names, (float(row) / n, float(cosine.mean()), float(correlation.mean())), strict=True))


def _columns(t: Tensor, s: Tensor) -> list[Tensor]:
    return [(t * s).sum(0), t.square().sum(0), s.square().sum(0)]


def _hsic(product: Tensor, lengths: Tensor, sum_t: Tensor, sum_s: Tensor, n: int) -> Tensor:
    """Song et al.'s unbiased HSIC, times n (n - 3), of centred features X and Y, for whose Gram matrices K1 = L1 = 0.

    ``product``: ‖XᵀY‖², ``lengths``: Σ |x_i|²|y_i|², and the sums of |x_i|² and of |y_i|².
    """
    return product - n / (n - 2) * lengths + sum_t * sum_s / ((n - 1) * (n - 2))


def _ratio(both: Tensor, first: Tensor, second: Tensor) -> float:
    """``both / sqrt(first second)``; 0 for a space without any variance."""
    return float(both / (first * second).sqrt()) if first > 0 and second > 0 else 0.0


def rows_of(features: Tensor, rows: slice, process: Process) -> Tensor:
    """These rows [b, d] in float64, on the device."""
    return features[rows].to(process.device, torch.float64)


def sum_over(mine: range, process: Process, part: Callable[[slice], Tensor]) -> Tensor:
    """The sum of ``part(rows)`` over slices of this rank's rows and over all ranks."""
    total = None
    for start in range(mine.start, mine.stop, ROWS):
        value = part(slice(start, min(start + ROWS, mine.stop)))
        total = value if total is None else total + value
    return all_reduce_sum(part(slice(0, 0)) if total is None else total)
