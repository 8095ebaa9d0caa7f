"""A .npy file that several processes write a range of rows at a time, resumable after a kill."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.agreement import on_first_rank, together
from runtime.device import Process, barrier, gather_objects
from runtime.errors import Damaged, UserError
from runtime.lock import FileLock, Held
from runtime.npy import Checksums, are_of_all, check_rows, checksum, map_array, pieces
from runtime.outputs import no_link, reserve
from runtime.state import load_json, save_json, write_atomic

ROWS, IDENTITY = "rows.npy", "identity.json"
OURS = re.compile(r"rows\.npy|identity\.json|done-\w+\.txt|\.(identity\.json|done-before\.txt)\.\d+\.tmp")
WAIT_SECONDS = 2.0


@contextmanager
def one_writer(path: Path, process: Process) -> Iterator[None]:
    """Keep other jobs from writing ``path``. All ranks enter it together, around the life of its :class:`RowFile`.

    The first rank locks the file ``path.stem + .lock`` beside it. If another job holds the lock, all ranks wait until
    it ends, and one line says so; the result may exist by then, so check again. Raises :class:`UserError` if the
    lock cannot be written.
    """
    lock, told = None, False
    while True:
        other = None

        def take() -> None:
            nonlocal lock, other
            try:
                lock = FileLock(path.with_suffix(".lock"))
            except Held as held:
                other = f"{path} is being written by {held}; this job waits until that one ends{held.hint}"
            except OSError as error:
                raise UserError(f"{path} could not be written ({error.strerror or error}); free some space or choose "
                                "another folder") from None

        on_first_rank(take, process)
        if not any(gather_objects(other)):
            break
        if other and not told:
            print(other, flush=True)
        told = True
        time.sleep(WAIT_SECONDS)  # on all ranks, so that no collective times out
    try:
        yield
    finally:
        if lock:
            lock.release()


class RowFile:
    """``path`` [rows, width], under construction in the folder ``path.stem + .partial`` beside it.

    That folder holds ``rows.npy`` at its full size, ``identity.json`` and, for each rank, ``done-RANK.txt``, a line for
    each range of rows that is on disk, with its CRC-32. Work of the same ``identity`` resumes there with any number of
    ranks; rows that were changed meanwhile are computed again. Only one job at a time may work there, so wrap it in
    :func:`one_writer`. All ranks open and finish it together, and all must see the folder. Raises
    :class:`UserError` if the disk is full or not writable, leaving nothing half written; and if the folder contains
    other work or someone else's files, which stay as they are.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], rows: int, width: int, dtype: np.dtype | type,
                 process: Process) -> None:
        self.path, self.folder, self.process = path, path.with_name(path.stem + ".partial"), process
        self.shape, self.dtype = (rows, width), np.dtype(dtype)
        self.identity = json.loads(json.dumps({**identity, "rows": rows, "width": width, "stored": self.dtype.str}))
        self._on_first_rank(self._start)
        with together(process):
            if not self._is_mine():
                raise UserError(f"{self.folder} does not exist there; choose one on a disk that all machines share")
        self.offset = (self.folder / ROWS).stat().st_size - rows * width * self.dtype.itemsize
        self._done = self._read_done()
        barrier()  # before anyone adds to what the others are still reading

    def missing(self, share: range) -> list[range]:
        """The parts of ``share`` that were not on disk when this object was created, in order."""
        gaps, at = [], share.start
        for first, last, _ in self._done:
            if first > at and at < share.stop:
                gaps.append(range(at, min(first, share.stop)))
            at = max(at, last)
        return gaps + ([range(at, share.stop)] if at < share.stop else [])

    def write(self, first: int, rows: np.ndarray) -> None:
        """Write rows [n, width] from row ``first`` on; when this returns, they are on disk and count as done."""
        data = np.ascontiguousarray(rows, self.dtype)
        if data.shape[1:] != self.shape[1:] or first + len(data) > self.shape[0]:
            raise ValueError(f"rows {list(data.shape)} from {first} on do not fit into {list(self.shape)}")
        try:
            with open(self.folder / ROWS, "r+b", opener=no_link) as file:  # noqa: PTH123
                file.seek(self.offset + first * self.shape[1] * self.dtype.itemsize)
                file.write(data.tobytes())
                file.flush()
                os.fsync(file.fileno())
            with open(self.folder / f"done-{self.process.rank}.txt", "ab", opener=no_link) as file:  # noqa: PTH123
                # The leading newline separates it from a line that a kill truncated.
                file.write(f"\n{first} {first + len(data)} {checksum(data)}\n".encode())
        except OSError as error:
            raise UserError(self._full(error), every_process=False) from None

    def finish(self, publish: Callable[[Path, Checksums], Any]) -> None:
        """When all ranks have written their rows: rank 0 hands the whole file to ``publish``, which moves it, with the
        checksums of its blocks."""
        def place() -> None:
            self._done = self._read_done()
            if self.missing(range(self.shape[0])):
                raise RuntimeError(f"rows of {self.path} were not written")
            publish(self.folder / ROWS, self._checksums())
            self._remove()

        barrier()
        self._on_first_rank(place)

    def _on_first_rank(self, work: Callable[[], None]) -> None:
        """The first rank's ``work``, and its error, if any, on every rank; a full disk is one that has a sentence."""
        def whole() -> None:
            try:
                work()
            except OSError as error:
                raise UserError(self._full(error)) from None

        on_first_rank(whole, self.process)

    def _checksums(self) -> Checksums:
        if are_of_all(self._done, self.shape[0]):
            return self._done
        rows = map_array(self.folder / ROWS)  # some were written twice
        return [(first, first + len(piece), checksum(piece)) for first, piece in pieces(rows)]

    def _start(self) -> None:
        if self._is_mine():
            self._forget_changed_rows()
            return
        self._refuse_other_work()
        self._remove()  # it cannot be resumed: its record is missing or damaged
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / ROWS, "wb", opener=no_link) as file:  # noqa: PTH123
                header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False,
                          "shape": self.shape}
                np.lib.format.write_array_header_1_0(file, header)
                file.flush()
                reserve(file, int(np.prod(self.shape)) * self.dtype.itemsize)
            save_json(self.identity, self.folder / IDENTITY)
        except (OSError, UserError):
            self._remove()
            raise

    def _refuse_other_work(self) -> None:
        """Raise :class:`UserError` if the folder holds work with other settings, or unrelated files."""
        if not self.folder.exists():
            return
        foreign = sorted(path.name for path in self.folder.iterdir() if not OURS.fullmatch(path.name))
        if foreign:
            raise UserError(f"{self.folder} holds {foreign[0]}, which does not belong to an unfinished "
                            f"{self.path.name}; move it away")
        with suppress(OSError, ValueError, AttributeError):  # unreadable, so it cannot be resumed
            before = load_json(self.folder / IDENTITY)
            changed = [f"{key} was {before.get(key)!r}, now {value!r}" for key, value in self.identity.items()
                       if before.get(key) != value]
            if changed:
                raise UserError(f"{self.folder} is unfinished work of other settings ({'; '.join(changed[:3])}); give "
                                "those to resume there, or remove it")

    def _remove(self) -> None:
        """Remove our files, and the folder if it is then empty."""
        with suppress(OSError):
            for path in self.folder.iterdir():
                if OURS.fullmatch(path.name):
                    path.unlink()
            self.folder.rmdir()

    def _forget_changed_rows(self) -> None:
        rows, kept = map_array(self.folder / ROWS), []
        for first, last, expected in self._read_done():
            with suppress(Damaged):
                check_rows(rows[first:last], [(0, last - first, expected)])
                kept.append(f"\n{first} {last} {expected}\n")
        write_atomic(self.folder / "done-before.txt", lambda file: file.write("".join(kept).encode()) and None)
        for path in self.folder.glob("done-*.txt"):
            if path.name != "done-before.txt":
                path.unlink()

    def _is_mine(self) -> bool:
        try:
            rows = map_array(self.folder / ROWS)
            return (load_json(self.folder / IDENTITY) == self.identity and rows.shape == self.shape
                    and rows.dtype == self.dtype and rows.flags.c_contiguous)
        except (OSError, ValueError, Damaged):
            return False

    def _read_done(self) -> list[tuple[int, int, int]]:
        """(first, last, CRC-32) of each range, in order."""
        blocks = set()
        for path in self.folder.glob("done-*.txt"):
            text = path.read_text(encoding="utf-8", errors="replace")
            for line in text.split("\n")[:-1]:  # a line that a kill truncated has no newline
                words = line.split()
                if len(words) == 3 and all(re.fullmatch(r"[0-9]{1,18}", word) for word in words):
                    first, last, expected = map(int, words)
                    if first < last <= self.shape[0]:
                        blocks.add((first, last, expected))
        return sorted(blocks)

    def _full(self, error: OSError) -> str:
        size = int(np.prod(self.shape)) * self.dtype.itemsize / 1e9
        return (f"{self.path} could not be written ({error.strerror or error}); it takes {size:.2g} GB, so free some "
                "space or choose another folder")


def open_rows(path: Path, dtype: str = "") -> Tensor:
    """A .npy file [rows, width] as a memory-mapped tensor; ``bfloat16`` is kept as int16, which numpy can hold.

    Writes to the tensor stay in this process. Check first that the file is complete.
    """
    rows = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    return rows.view(torch.bfloat16) if dtype == "bfloat16" else rows
