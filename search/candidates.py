"""The candidates for the best of each row while a search passes over the bank, in bounded memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

EMPTY = torch.iinfo(torch.int64).min      # the key of no candidate, below every other
LOW = 0xFFFFFFFF                          # the lower half of a key: the id, counted from the top
MOST_ROWS = 32_767                        # rows of a block, so that an int16 numbers them
STRIP = 1 << 17                           # scores that a CPU thread examines at a time, so that they stay in its cache
PIECE = 1 << 24                           # keys processed at a time on a GPU


def encode(scores: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that sort, in descending order, by score (float32, not NaN), and equal scores by ascending id."""
    bits = (scores + 0.0).view(torch.int32)                      # + 0.0: -0.0 and 0.0 are one score
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)                 # the order of floats as the order of integers
    return (ordered.long() << 32) | (LOW - ids)


def decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores float32 and ids int64 of :func:`encode`."""
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32), LOW - (keys & LOW)


def capacity(keep: int) -> int:
    """The number of keys to hold per row for the best ``keep``; 8 bytes each."""
    return 3 * keep + 128


class Candidates:
    """The best ``keep`` scores seen so far of each of ``rows`` rows, and some that may still be dropped.

    ``floor`` float32 [rows]: scores below it are ignored. It may start as a guess: a row whose guess was too high ends
    with too few. ``sign`` -1 looks for the lowest scores: scores and floor are negated. Ids must ascend from call to
    call, so that among equal scores the first ones are kept.
    """

    def __init__(self, rows: int, keep: int, device: torch.device, sign: int = 1) -> None:
        self.keep, self.sign = keep, sign
        self.floor = torch.full((rows,), -torch.inf, device=device)
        self.keys = torch.empty(rows, capacity(keep), dtype=torch.int64, device=device)
        self.count = torch.zeros(rows, dtype=torch.int64, device=device)

    def sift(self, scores: Tensor, first_id: int) -> None:
        """Keep those of ``scores`` float32 [rows, t] that reach the floor; may be the transpose of a contiguous tensor.
        Column j has id ``first_id + j``. NaN is never kept."""
        raise NotImplementedError

    def finish(self) -> Tensor:
        """Keys int64 [rows, keep], best first, EMPTY if there were too few. Dropped scores are below ``floor``."""
        raise NotImplementedError

    def _merge(self, rows: Tensor, scores: Tensor, first_id: int) -> None:
        """Scores [r, t] of single rows of which more pass than there is room for: cut at once to the best."""
        scores = self.sign * scores
        ids = torch.arange(first_id, first_id + scores.shape[1], device=scores.device)
        new = torch.where(scores >= self.floor[rows, None], encode(scores, ids), EMPTY)
        best = torch.cat([self._whole(rows), new], dim=1).topk(self.keep, dim=1).values
        self.keys[rows, :self.keep], self.count[rows] = best, self.keep
        self.floor[rows] = torch.maximum(self.floor[rows], _above(best[:, -1]))

    def _whole(self, rows: Tensor | slice) -> Tensor:
        """Keys [r, capacity] with EMPTY where nothing is held."""
        places = torch.arange(self.keys.shape[1], device=self.keys.device)
        return torch.where(places < self.count[rows, None], self.keys[rows], EMPTY)


def candidates(rows: int, keep: int, device: torch.device, sign: int = 1) -> Candidates:
    """A new :class:`Candidates` for ``device``."""
    return (OnCpu if device.type == "cpu" else OnGpu)(rows, keep, device, sign)


class OnGpu(Candidates):
    """All rows at once with torch operations; runs on a CPU too."""

    def sift(self, scores: Tensor, first_id: int) -> None:
        step = max(1, PIECE // scores.shape[1])
        for first in range(0, len(scores), step):
            self._sift(scores[first:first + step], first, first_id)

    def _sift(self, scores: Tensor, start: int, first_id: int) -> None:
        part = slice(start, start + len(scores))
        limit = self.sign * self.floor[part, None]
        mask = (scores >= limit if self.sign > 0 else scores <= limit).contiguous()
        passed = mask.sum(1)
        heavy = (self.count[part] + passed > self.keys.shape[1]).nonzero()[:, 0]
        if len(heavy):
            self._merge(heavy + start, scores[heavy], first_id)
            mask[heavy], passed[heavy] = False, 0
        row, column = mask.nonzero(as_tuple=True)
        place = (self.count[part] - passed.cumsum(0) + passed)[row] + torch.arange(len(row), device=row.device)
        self.keys[row + start, place] = encode(self.sign * scores[row, column], first_id + column)
        self.count[part] += passed

    def finish(self) -> Tensor:
        step = max(1, PIECE // self.keys.shape[1])
        best = torch.cat([self._whole(slice(first, first + step)).topk(self.keep, dim=1).values
                          for first in range(0, len(self.keys), step)])
        self.floor = torch.where(self.count > self.keep, torch.maximum(self.floor, _above(best[:, -1])), self.floor)
        return best


class OnCpu(Candidates):
    """A strip of rows per thread, in numpy, whose calls use one thread and release the GIL."""

    def sift(self, scores: Tensor, first_id: int) -> None:
        for first in range(0, scores.shape[1], STRIP):
            piece = scores[:, first:first + STRIP]
            height = max(1, STRIP // piece.shape[1])
            _each(lambda start, piece=piece, height=height, first=first: self._strip(
                piece[start:start + height], start, first_id + first), range(0, len(piece), height))

    def _strip(self, scores: Tensor, start: int, first_id: int) -> None:
        part, room = slice(start, start + len(scores)), self.keys.shape[1]
        limit, count = self.sign * self.floor[part].numpy(), self.count[part].numpy()
        # In the order of memory: a transposed strip is looked through column by column.
        upright = scores.stride(1) == 1
        table, limit = (scores.numpy(), limit[:, None]) if upright else (scores.T.numpy(), limit[None])
        hits = np.flatnonzero(table >= limit if self.sign > 0 else table <= limit)
        high = hits // table.shape[1]
        wide = hits - high * table.shape[1]
        row, column = (high, wide) if upright else (wide, high)
        if not upright:
            order = np.argsort(row.astype(np.int16), kind="stable")  # a radix sort
            row, column, high, wide = row[order], column[order], high[order], wide[order]
        values = table[high, wide]
        passed = np.bincount(row, minlength=len(count))
        heavy = count + passed > room
        if heavy.any():
            rows = torch.from_numpy(heavy.nonzero()[0])
            self._merge(rows + start, scores[rows], first_id)
            others = ~heavy[row]
            row, column, values = row[others], column[others], values[others]
            passed[heavy] = 0
        place = (count - passed.cumsum() + passed + np.arange(len(count)) * room)[row]
        place += np.arange(len(row))
        self.keys[part].numpy().reshape(-1)[place] = _encode(values if self.sign > 0 else -values, column + first_id)
        count += passed

    def finish(self) -> Tensor:
        best = torch.empty(len(self.keys), self.keep, dtype=torch.int64)
        step = max(1, STRIP // self.keys.shape[1])

        def cut(start: int) -> None:
            part = slice(start, start + step)
            widest = max(int(self.count[part].max()), self.keep)
            keys = self._whole(part)[:, :widest].numpy()
            keys.sort(axis=1)  # numpy sorts integers with AVX-512 or AVX2
            best[part] = torch.from_numpy(keys[:, ::-1][:, :self.keep].copy())

        _each(cut, range(0, len(best), step))
        self.floor = torch.where(self.count > self.keep, torch.maximum(self.floor, _above(best[:, -1])), self.floor)
        return best


def _above(keys: Tensor) -> Tensor:
    """The lowest score still wanted when ``keys`` are a row's last: later ids are higher, so an equal score is not."""
    scores = decode(keys)[0]
    return torch.nextafter(scores, torch.full_like(scores, torch.inf))


def _encode(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    bits = (scores + np.float32(0)).view(np.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)
    keys <<= 32
    keys |= LOW - ids
    return keys


def _each(work: Callable[[int], None], numbers: range) -> None:
    """``work`` for each number, in as many threads as torch would use."""
    if torch.get_num_threads() == 1 or len(numbers) == 1:
        for number in numbers:
            work(number)
    else:
        list(_pool(torch.get_num_threads()).map(work, numbers))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
