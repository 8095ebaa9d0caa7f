"""The Batch type, and the handling of unreadable images and dead workers."""

from __future__ import annotations

import hashlib
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from data.images import BadImage
from data.parcels import fits
from data.samplers import Key
from data.sources import ImageSource
from runtime.errors import UserError

REPLACEMENT_ATTEMPTS = 8


class Batch(NamedTuple):
    """One step's images.

    views: one uint8 [B, 3, S, S] for each view, in the order of data.augment.draw_views; () if even the replacements of
    an image could not be opened, which BadImageLog.check refuses. indices: int64 [B], the images that were asked for.
    bad: (index, reason) of each image that could not be opened; if such an index is in `indices`, its pixels are those
    of another image. colour: for each view the colour parameters still to be applied, float32 [B, 8]
    (data.augment.COLOUR); () if none are. decoded: number of images opened for this batch.
    """

    views: tuple[torch.Tensor, ...]
    indices: torch.Tensor
    bad: list[tuple[int, str]]
    colour: tuple[torch.Tensor, ...] = ()
    decoded: int = 0


def as_key(key: Key | int) -> Key:
    """(index, stamp). A plain index serves as its own stamp."""
    return key if isinstance(key, tuple) else (int(key), int(key))


def open_or_replace(open_image: Callable[[int], Any], index: int, stamp: int, seed: int, count: int,
                    ) -> tuple[Any, list[tuple[int, str]]]:
    """Open image `index` of `count`, or another one drawn from (seed, stamp, attempt) if that fails. Returns the result
    of `open_image`, or None if all attempts fail, and (index, reason) of each image that failed."""
    bad = []
    for attempt in range(1 + REPLACEMENT_ATTEMPTS):
        try:
            return open_image(index), bad
        except (BadImage, MemoryError) as error:
            reason = str(error) if isinstance(error, BadImage) else "there is not enough memory for its pixels"
            bad.append((index, reason))
            index = _hash(seed, stamp, "replacement", attempt) % count
    return None, bad


def _hash(*parts: object) -> int:
    """A 63-bit hash of all parts."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class BadImageLog:
    """Counts the images that cannot be opened. policy 'error' stops at the first, 'skip' continues with the images that
    replace them."""

    def __init__(self, source: ImageSource, policy: str):
        if policy not in ("error", "skip"):
            raise UserError(f"--on-bad-image {policy} is unknown; choose error or skip")
        self.source, self.policy = source, policy
        self.counts: Counter[int] = Counter()
        self.reasons: dict[int, str] = {}

    def check(self, batch: Batch) -> None:
        """Check a batch before it is used. Raises UserError with the file and the reason."""
        for index, reason in batch.bad:
            self.counts[index] += 1
            self.reasons[index] = reason
        if batch.bad and self.policy == "error":
            raise UserError(
                f"{self._describe(batch.bad[0][0])} could not be opened; replace or remove the file, "
                "or continue without such files by --on-bad-image skip",
                every_process=False,
            )
        if not batch.views:
            raise UserError(
                f"{self._describe(batch.bad[0][0])} and other images drawn in its place could not be opened, "
                f"{len(self.counts):,} in all; check that the disk of --data can be read",
                every_process=False,
            )

    def summary(self) -> str:
        """One line, which names the first five; '' if every image could be opened."""
        if not self.counts:
            return ""
        shown = ", ".join(self._describe(index) for index in list(self.counts)[:5])
        more = ", ..." if len(self.counts) > 5 else ""
        return (
            f"images that could not be opened: {len(self.counts):,}, replaced by others "
            f"{self.counts.total():,} times: {shown}{more}"
        )

    def _describe(self, index: int) -> str:
        return f"{self.source.shown(index)} ({self.reasons[index]})"


_CAUSES = {
    "SIGKILL": "most likely the machine ran out of memory; lower --workers or --batch-size",
    "SIGBUS": "most likely a file that it reads, such as a packed file, was cut short or replaced meanwhile",
    "SIGSEGV": "most likely an image crashed its decoder; run with --workers 0 --data-path pil to find it",
}


@contextmanager
def named_deaths(workers: Sequence[Any]) -> Iterator[None]:
    """Turns the error that torch raises if a worker ends into a UserError that names the worker and the likely cause.

    torch raises a RuntimeError, or the connection breaks if the worker was just sending a batch.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        for worker in workers:
            worker.join(0.1)  # the connection may break before the system reports the end of the process
        dead = next(((i, w) for i, w in enumerate(workers) if w.exitcode), None)
        if dead is None:
            raise
        number, worker = dead
        if worker.exitcode < 0:
            name = signal.Signals(-worker.exitcode).name
            end, cause = f"was ended by {name}", _CAUSES.get(name, "most likely another process or a person stopped it")
            if name == "SIGBUS" and not fits(0):  # mapped memory has this other cause of SIGBUS
                cause = "shared memory is full; enlarge /dev/shm (docker run --shm-size 8g) or lower --workers"
        else:
            end, cause = f"ended with exit code {worker.exitcode}", "run with --workers 0 to see why"
        raise UserError(f"data worker {number} (process {worker.pid}) {end}: {cause}", every_process=False) from None
