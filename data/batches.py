"""What a batch is, and what becomes of images and workers that fail."""

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

    views: for each view uint8 [B, 3, S, S], in the order of data.augment.draw_views. indices: int64 [B], the images
    asked for. bad: (index, reason) of each image that could not be opened; where such an index is in `indices`, its
    pixels are another image's. views is () where even the replacements could not be opened, which BadImageLog.check
    refuses. colour: for each view float32 [B, 8] (data.augment.COLOUR) still to be applied; () where views are
    finished. decoded: images opened for this batch.
    """

    views: tuple[torch.Tensor, ...]
    indices: torch.Tensor
    bad: list[tuple[int, str]]
    colour: tuple[torch.Tensor, ...] = ()
    decoded: int = 0


def as_key(key: Key | int) -> Key:
    """(index, stamp); a plain index is its own stamp."""
    return key if isinstance(key, tuple) else (int(key), int(key))


def open_or_replace(open_image: Callable[[int], Any], index: int, stamp: int, seed: int, count: int,
                    ) -> tuple[Any, list[tuple[int, str]]]:
    """Image `index` of `count`, or another drawn from (seed, stamp, attempt); and (index, reason) of each that failed.

    None for an image where the replacements failed too.
    """
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
    """63 bits that depend on every part."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class BadImageLog:
    """What to do about images that cannot be opened.

    policy 'error' stops at the first; 'skip' takes another image in its place and counts them.
    """

    def __init__(self, source: ImageSource, policy: str):
        if policy not in ("error", "skip"):
            raise UserError(f"--on-bad-image {policy} is unknown; choose error or skip")
        self.source, self.policy = source, policy
        self.counts: Counter[int] = Counter()
        self.reasons: dict[int, str] = {}

    def check(self, batch: Batch) -> None:
        """Look at a batch before using it. Raises UserError that names the file and the reason."""
        for index, reason in batch.bad:
            self.counts[index] += 1
            self.reasons[index] = reason
        if batch.bad and self.policy == "error":
            raise UserError(
                f"{self._describe(batch.bad[0][0])} could not be opened; replace or remove the file, "
                "or continue without such files with --on-bad-image skip",
                every_process=False,
            )
        if not batch.views:
            raise UserError(
                f"{self._describe(batch.bad[0][0])} and other images drawn in its place could not be opened, "
                f"{len(self.counts):,} in all; check that the disk of --data can be read",
                every_process=False,
            )

    def summary(self) -> str:
        """One line, with the first five by name."""
        if not self.counts:
            return "every image could be opened"
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
    "SIGBUS": "most likely a file that it reads, a pack of --data, was cut short or replaced meanwhile",
    "SIGSEGV": "most likely an image crashed its decoder; run with --workers 0 --data-path pil to find it",
}


@contextmanager
def named_deaths(workers: Sequence[Any]) -> Iterator[None]:
    """Turns what torch raises over workers that ended into a UserError that names one and the likely cause.

    That is a RuntimeError, or a broken connection where the worker's last batch was on its way.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        for worker in workers:
            worker.join(0.1)  # the connection may break before the system says that the process has ended
        dead = next(((i, w) for i, w in enumerate(workers) if w.exitcode), None)
        if dead is None:
            raise
        number, worker = dead
        if worker.exitcode < 0:
            name = signal.Signals(-worker.exitcode).name
            end, cause = f"was ended by {name}", _CAUSES.get(name, "somebody or something outside stopped it")
            if name == "SIGBUS" and not fits(0):  # the other cause that memory which is mapped has
                cause = "shared memory is full; enlarge /dev/shm (docker run --shm-size 8g) or lower --workers"
        else:
            end, cause = f"ended with exit code {worker.exitcode}", "run with --workers 0 to see why"
        raise UserError(f"data worker {number} (process {worker.pid}) {end}: {cause}", every_process=False) from None
