"""Exact nearest (and farthest) neighbours by inner product, cosine or Euclidean distance, of any number of rows.

Products are computed a tile at a time, and only scores that can still be among a row's best are examined. A row's
threshold starts as the score of some rank in a random sample of the bank, which is almost certainly low enough; k
candidates above it prove that (a row with fewer is searched again without it). When a bank is searched among itself,
each product serves both its rows, so only half of them are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from runtime.device import free_memory
from search.candidates import EMPTY, MOST_ROWS, Candidates, candidates, capacity, decode, encode
from search.products import Bank, Operand

SHARE = 0.5                                      # of the free memory, if no limit is given
TILE = {"cpu": 4 << 20, "cuda": 128 << 20}       # scores of a tile, at most: within a CPU's cache, 512 MB on a GPU
SCORE = 6                                        # bytes: float32, and a mask or two
IN_SAMPLE = 16                                   # of a row's neighbours are expected in the sample
GATHERED = {"cpu": 1 << 20, "cuda": 64 << 20}    # numbers gathered at a time for exact scores


class Found(NamedTuple):
    """One direction of a block, best first: values float32 [b, k] and indices int64 [b, k], on the CPU."""

    values: Tensor
    indices: Tensor


class Block(NamedTuple):
    """The results of queries ``first`` … ``first + b``; near and far as requested."""

    first: int
    near: Found | None
    far: Found | None


def top_k(queries: Tensor, bank: Tensor, k: int, *, self_offset: int | None = None, largest: bool = True,
          **options: object) -> tuple[Tensor, Tensor]:
    """The ``k`` rows of ``bank`` [n, d] nearest to (or, ``largest=False``, farthest from) each of ``queries`` [q, d].

    ``self_offset``: query i is row ``self_offset + i`` of the bank and is left out by that identity, wherever its
    copies rank. ``options`` are those of :func:`search`. Returns values float32 [q, k], best first, and indices
    int64 [q, k], both on the CPU. Raises ValueError if the bank has fewer than ``k`` rows to give.
    """
    values, indices = torch.empty(len(queries), max(k, 0)), torch.empty(len(queries), max(k, 0), dtype=torch.int64)
    alone = None if self_offset is None else range(self_offset, self_offset + len(queries))
    for block in search(queries if alone is None else None, bank, k, rows=alone, near=largest, far=not largest,
                        **options):
        found = block.near if largest else block.far
        place = slice(block.first, block.first + len(found.values))
        values[place], indices[place] = found
    return values, indices


def search(queries: Tensor | None, bank: Tensor, k: int, *, rows: range | None = None, near: bool = True,
           far: bool = False, metric: str = "inner", products: str = "float32", memory: int | None = None,
           device: torch.device | str = "cpu", label: str = "search", progress: bool = False) -> Iterator[Block]:
    """Blocks of results in ascending order of the queries, each as soon as it is complete.

    queries [q, d]: searched among all of ``bank`` [n, d]; None: the bank's own rows, each among all others.
    rows: which queries (None: all). Both may be float32, float16 or bfloat16, and memory-mapped files.
    near, far: the k largest and the k smallest similarities (the smallest and the largest distances).
    metric: ``inner`` product; ``cosine``, where a zero row has similarity 0 to all; ``l2``, with squared distances.
    products: ``float32``; ``tf32`` and ``bf16`` pick a wider list, which is scored again in float32, and a row whose
    list is not proven by the error's bound to hold its k best is searched again in float32.
    memory: bytes to use on ``device`` in addition to the inputs (at least some 50 MB); None: half of what is free.
    The bank made ready for products (normalised, on the GPU) is held if it fits into half of that, an eighth on a CPU.

    Guaranteed: the result of a full sort of the scores as the products give them, equal scores in the order of their
    indices. Where float32 products are exact (small integers) that is one result for any memory, split into ranks and
    device; elsewhere two scores closer than float32's rounding (some 1e-7 of the lengths' product, for l2 of the
    squared lengths) may change places.
    Raises ValueError if k does not fit, and UserError that names the first row that is not finite.
    """
    available = len(bank) - (queries is None)
    if not 0 < k <= available:
        raise ValueError(f"k = {k}, but there are {available} rows to choose from")
    if queries is not None and (queries.ndim != 2 or queries.shape[1] != bank.shape[1]):
        raise ValueError(f"queries {list(queries.shape)} do not fit the bank {list(bank.shape)}")
    rows = range(len(bank) if queries is None else len(queries)) if rows is None else rows
    if not len(rows) or not (near or far):
        return
    job = _Search(queries, bank, k, [1] * near + [-1] * far, metric, products, memory, torch.device(device))
    with tqdm(total=len(rows), desc=label, unit="row", unit_scale=True, leave=False,
              disable=None if progress else True) as bar:
        job.bar = bar
        for part, keys in job.run(rows):
            found = {sign: job.found(key, sign) for sign, key in keys.items()}
            yield Block(part.first - rows.start, found.get(1), found.get(-1))


@dataclass
class _Part:
    """A block of queries being searched: their numbers, and the candidates of each direction (1 near, -1 far)."""

    first: int
    size: int
    taken: dict[int, Candidates]


class _Search:
    def __init__(self, queries: Tensor | None, bank: Tensor, k: int, signs: list[int], metric: str, products: str,
                 memory: int | None, device: torch.device) -> None:
        memory = int(free_memory(device) * SHARE) if memory is None else memory
        self.k, self.signs, self.device, self.bar = k, signs, device, None
        self.among_itself = queries is None
        self.available = len(bank) - self.among_itself
        # On a CPU the bank is read where it lies; only a small one is worth a copy that is normalised once.
        self.bank = Bank(bank, metric, products, device, memory // (8 if device.type == "cpu" else 2))
        self.queries = self.bank if queries is None else Bank(queries, metric, products, device, 0)
        memory -= self.bank.held
        # With rounded products the list is wider, so that the best of the rest can be told from its k best.
        self.keep = min(k if self.bank.exact else k + k // 2 + 32, self.available)
        self.tile = max(64, min(TILE[device.type], memory // 3 // SCORE))
        self.in_work = max(1, memory // 3 // (capacity(self.keep) * 8 * len(signs)))
        self.block = min(int(self.tile ** 0.5), MOST_ROWS, self.in_work)
        self.scores = torch.empty(self.tile, device=device)
        self.sample, self.rank = self._sample(memory // 8)

    def run(self, rows: range) -> Iterator[tuple[_Part, dict[int, Tensor]]]:
        """Each block of rows and its keys int64 [b, k] by direction."""
        panels = -(-len(rows) // self.in_work)
        size = -(-len(rows) // panels)
        for first in range(rows.start, rows.stop, size):
            panel = range(first, min(first + size, rows.stop))
            yield from self._panel(panel) if self.among_itself else self._others(panel)

    def found(self, keys: Tensor, sign: int) -> Found:
        """Values and indices of keys."""
        scores, ids = decode(keys)
        return Found(self.bank.values(sign * scores).cpu(), ids.cpu())

    def _panel(self, panel: range) -> Iterator[tuple[_Part, dict[int, Tensor]]]:
        """Rows of the bank; products among themselves are made once. Each row meets the bank in ascending order."""
        parts = [self._part(first, panel) for first in range(panel.start, panel.stop, self.block)]
        for part in parts:
            self._meet(part, range(panel.start))
        for i, part in enumerate(parts):
            rows = self._take(part)
            for other in parts[i:]:
                scores = self.bank.score(rows, self._take(other), self.scores)
                if other is part:
                    scores.fill_diagonal_(torch.nan)
                self._sift(part, scores, other.first)
                if other is not part:
                    self._sift(other, scores.T, part.first)
            self._meet(part, range(panel.stop, len(self.bank)))
            yield part, self._finish(part)

    def _others(self, panel: range) -> Iterator[tuple[_Part, dict[int, Tensor]]]:
        for first in range(panel.start, panel.stop, self.block):
            part = self._part(first, panel)
            self._meet(part, range(len(self.bank)))
            yield part, self._finish(part)

    def _part(self, first: int, panel: range) -> _Part:
        size = min(self.block, panel.stop - first)
        part = _Part(first, size, {sign: candidates(size, self.keep, self.device, sign) for sign in self.signs})
        if self.sample is not None:
            scores = self.bank.score(self._take(part), self.sample, self.scores)
            for sign, taken in part.taken.items():
                taken.floor = sign * scores.topk(self.rank, dim=1, largest=sign > 0).values[:, -1]
        return part

    def _sample(self, room: int) -> tuple[Operand | None, int]:
        """Rows drawn from the bank, and the rank among them whose score is the first threshold."""
        count = len(self.bank)
        size = min(IN_SAMPLE * count // self.keep, count // 16, self.tile // self.block, room // (4 * self.bank.width))
        expected = self.keep * size / count
        rank = int(expected + 4 * expected ** 0.5 + 2)  # four standard deviations more, and the row itself
        if count < 4 * self.keep or rank > size:
            return None, 0
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:size].sort().values
        return self.bank.take(drawn), rank

    def _take(self, part: _Part) -> Operand:
        return self.queries.take(slice(part.first, part.first + part.size))

    def _meet(self, part: _Part, columns: range) -> None:
        """Scores with rows of the bank outside the part."""
        if not len(columns):
            return
        rows, step = self._take(part), self.tile // part.size
        for first in range(columns.start, columns.stop, step):
            tile = self.bank.take(slice(first, min(first + step, columns.stop)))
            self._sift(part, self.bank.score(rows, tile, self.scores), first)

    def _sift(self, part: _Part, scores: Tensor, first: int) -> None:
        for taken in part.taken.values():
            taken.sift(scores, first)
        if self.bar is not None:
            self.bar.update(scores.numel() / len(self.bank))

    def _finish(self, part: _Part) -> dict[int, Tensor]:
        """Keys [b, k] by direction; rows with too few candidates or an unproven list are searched again."""
        keys = {}
        for sign, taken in part.taken.items():
            best, floor = taken.finish(), torch.full_like(taken.floor, -torch.inf)
            short = best[:, self.k - 1] == EMPTY
            if not self.bank.exact:
                best, unproven, floor = self._score_again(part, best, taken.floor, sign)
                short |= unproven
            again = short.nonzero()[:, 0]
            best = best[:, :self.k]
            if len(again):
                best[again] = self._search_again(again + part.first, floor[again], sign)
            keys[sign] = best
        part.taken = {}
        return keys

    def _score_again(self, part: _Part, best: Tensor, floor: Tensor, sign: int,
                     ) -> tuple[Tensor, Tensor, Tensor]:
        """The k best [b, k] of lists ``best`` [b, w] by float32 scores; the rows [b] whose list may lack one; and what
        the k best score at least [b]."""
        ids = decode(best)[1].clamp(max=len(self.bank) - 1)
        rows = self.queries.exact_rows(slice(part.first, part.first + part.size))
        keys = torch.empty_like(best)
        step = max(1, GATHERED[self.device.type] // (best.shape[1] * self.bank.width))
        for first in range(0, part.size, step):
            place = slice(first, first + step)
            keys[place] = encode(sign * self.bank.exact_scores(rows[place], ids[place]), ids[place])
        keys = torch.where(best == EMPTY, best, keys).sort(dim=1, descending=True).values[:, :self.k]
        worst = torch.where(keys[:, -1] == EMPTY, -torch.inf, decode(keys[:, -1])[0])
        # What is not in the list has a rounded score below the floor, so a true one below floor + error.
        unproven = (worst <= floor + self.queries.error(rows, self.bank)) & (self.keep < self.available)
        return keys, unproven, worst - self.queries.float32().error(rows, self.bank)

    def _search_again(self, numbers: Tensor, floor: Tensor, sign: int) -> Tensor:
        """Keys [r, k] of single queries by float32 products with the whole bank; ``floor`` [r] is certainly reached."""
        taken = candidates(len(numbers), self.k, self.device, sign)
        taken.floor = floor
        rows = Operand(*self.queries.float32().take(numbers))
        bank, step = self.bank.float32(), max(1, self.tile // len(numbers))
        for first in range(0, len(self.bank), step):
            last = min(first + step, len(self.bank))
            scores = bank.score(rows, bank.take(slice(first, last)), self.scores)
            if self.among_itself:
                own = ((numbers >= first) & (numbers < last)).nonzero()[:, 0]
                scores[own, numbers[own] - first] = torch.nan
            taken.sift(scores, first)
        return taken.finish()
