"""Writes neighbours as they are found, by all ranks, skipping unreadable images."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from data.neighbours import LEFT_OUT
from search.exact import Block
from search.rowfile import RowFile


def write_neighbours(files: list[RowFile], share: range, kept: np.ndarray,
                     search: Callable[[range], Iterable[Block]]) -> None:
    """Write the missing rows of ``share``, of the nearest and, if there is a second file, of the farthest. ``kept``,
    int64 [n]: the readable images, in ascending order; ``search(rows)`` searches some of these among all of these. The
    rows of the other images hold LEFT_OUT."""
    for todo in union_of_ranges([file.missing(share) for file in files]):
        rows = range(*np.searchsorted(kept, (todo.start, todo.stop)).tolist())
        _write_rows(files, todo, kept, rows.start, search(rows))


def _write_rows(files: list[RowFile], todo: range, kept: np.ndarray, first: int, blocks: Iterable[Block]) -> None:
    """Write the rows ``todo``, in numbers of all images, from what was found among the images ``kept``, int64 [n], from
    row ``first`` of these on. The rows of the images between them hold LEFT_OUT."""
    at = todo.start
    for block in blocks:
        numbers = kept[first + block.first:][:len(block.near.indices)]
        for file, found in zip(files, (block.near, block.far)[:len(files)], strict=True):
            rows = np.full((numbers[-1] + 1 - at, file.shape[1]), LEFT_OUT)
            rows[numbers - at] = kept[found.indices.numpy()]
            file.write(at, rows)
        at = int(numbers[-1]) + 1
    for file in files:
        if at < todo.stop:
            file.write(at, np.full((todo.stop - at, file.shape[1]), LEFT_OUT))


def union_of_ranges(lists: list[list[range]]) -> list[range]:
    """Ranges, in order and apart, of the numbers that are in a range of any of the ``lists``."""
    merged: list[range] = []
    for part in sorted((part for ranges in lists for part in ranges), key=lambda part: part.start):
        if merged and part.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, part.stop))
        else:
            merged.append(part)
    return merged
