"""Arrays in .npy files that may be large or damaged: memory-mapped safely, and verified by checksums."""

from __future__ import annotations

import ast
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from runtime.errors import Damaged
from runtime.regular import open_regular
from runtime.state import load_json

NPY = b"\x93NUMPY\1\0"  # begins a file of version 1.0, of which all are whose header is short
CHECKSUMS = "checksums"  # their name in the JSON beside an array
PIECE = 32 << 20  # bytes that are read at once
Checksums = Sequence[Sequence[int]]  # (first row, row after the last, CRC-32 of their bytes), one for each block


def map_array(path: Path) -> np.memmap:
    """The array in ``path``, memory-mapped read-only. Raises :class:`Damaged` for anything but one complete array of
    numbers, whatever its header says, and OSError if the file cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        if error.filename or error.errno:
            raise
        raise Damaged("its end is missing") from None
    except Exception as error:  # noqa: BLE001 - a damaged header fails in a dozen ways, tokenize.TokenError among them
        raise Damaged(f"its header is damaged ({type(error).__name__})") from None
    if not isinstance(array, np.memmap):
        raise Damaged("it is an .npz archive, not a single array")
    size = path.stat().st_size - array.offset
    if array.nbytes != size:
        raise Damaged(f"its header says {array.nbytes:,} bytes of numbers and it has {size:,}")
    return array


def holds_an_object(path: str | os.PathLike) -> bool:
    """Whether an .npy file holds one Python object, as np.save makes of a dictionary; reads its header. Without numpy,
    so that a command line can be refused before it is imported."""
    try:
        with open_regular(path) as file:
            if file.read(len(NPY)) != NPY:
                return False
            header = ast.literal_eval(file.read(int.from_bytes(file.read(2), "little")).decode("latin-1"))
        return header["shape"] == () and header["descr"] == "|O"
    except Exception:  # noqa: BLE001 - as above
        return False


def checksum(rows: np.ndarray, before: int = 0) -> int:
    """CRC-32 of rows [n, ...] as stored in a file, continued from that of the rows before them."""
    return zlib.crc32(np.ascontiguousarray(rows).data.cast("B") if rows.size else b"", before)


def pieces(rows: np.ndarray, checksums: Checksums | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """(first, rows [n, ...] from that row on), in order, a few MB at a time.

    Raises :class:`Damaged` at the end of a block that does not match its checksum, and if the blocks do not cover
    exactly the rows in order.
    """
    if checksums is not None and not are_of_all(checksums, len(rows)):
        raise Damaged(f"its checksums are not those of {len(rows):,} rows")
    blocks = [(0, len(rows), None)] if checksums is None else checksums
    at_once = max(1, PIECE * len(rows) // max(1, rows.nbytes))
    for first, last, expected in blocks:
        found = 0
        for start in range(first, last, at_once):
            piece = rows[start:min(start + at_once, last)]
            if expected is not None:
                found = checksum(piece, found)
            yield start, piece
        if expected is not None and found != expected:
            raise Damaged(f"rows {first:,} to {last - 1:,} were changed after they were written")


def are_of_all(checksums: Checksums, count: int) -> bool:
    """Whether the blocks cover ``count`` rows in order, without gaps."""
    return [first for first, _, _ in checksums] + [count] == [0] + [last for _, last, _ in checksums]


def check_rows(rows: np.ndarray, checksums: Checksums, part: int = 0, parts: int = 1) -> None:
    """Raises :class:`Damaged` if rows have changed since ``checksums``, which must cover all rows, were computed. Each
    of several processes reads the blocks of its ``part`` of ``parts``."""
    if not are_of_all(checksums, len(rows)):
        raise Damaged(f"its checksums are not those of {len(rows):,} rows")
    for first, last, expected in checksums[part::parts]:
        for _ in pieces(rows[first:last], [(0, last - first, expected)]):
            pass


def read_checksums(value: object) -> Checksums:
    """``value``, from a JSON file, if it has the form of checksums. Raises :class:`Damaged`."""
    if not (isinstance(value, list) and value and all(
            isinstance(block, list) and len(block) == 3 and all(type(x) is int and x >= 0 for x in block)
            for block in value)):
        raise Damaged("its .json has no checksums of its rows")
    return value


def whole_json(path: Path) -> dict:
    """The object in a JSON file. Raises :class:`Damaged` for anything else, and OSError if it cannot be read."""
    try:
        value = load_json(path)
    except ValueError as error:
        raise Damaged(f"{path.name} is not valid JSON ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise Damaged(f"{path.name} holds a {type(value).__name__}, not an object")
    return value
