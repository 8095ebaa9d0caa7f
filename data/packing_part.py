"""An unfinished packed file: it keeps the images that are done, and becomes the packed file when all are."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.packed import HEADER_SIZE, MODES, RECORD, digest_of, pack_header
from data.sources import ImageSource
from runtime.errors import UserError
from runtime.outputs import no_link
from runtime.state import parse_json

FLUSH_BYTES, FLUSH_SECONDS = 64 << 20, 2.0  # at most about this much work is lost if the process is killed


@dataclass(frozen=True)
class Recipe:
    """How images are stored. short_side: pixels; quality: of JPEG, 1 to 100. Each is None if the mode has no use for
    it."""

    mode: str = "original"
    short_side: int | None = None
    quality: int | None = None

    def __post_init__(self):
        if self.mode not in MODES or (self.mode != "original") != bool(self.short_side) or (
                (self.mode == "jpeg") != bool(self.quality)):
            raise ValueError(f"mode, short_side and quality do not fit together: {self}")


@dataclass
class Encoded:
    """One image to be written; content is None if the image is unreadable, for the reason given."""

    content: bytes | None
    size: tuple[int, int] = (0, 0)
    stored: tuple[int, int] = (0, 0)
    crc: int = 0
    reason: str = ""


class UnfinishedPack:
    """PATH.part, which holds space for the header and the records so far, and PATH.part.index, which holds a line of
    JSON that says what is packed and how, then a RECORD for each image done, all zeros for one left out. The index is
    written after the data is on the disk, so that whatever it lists survives a kill or a power failure."""

    def __init__(self, source: ImageSource, path: Path, recipe: Recipe):
        self.source, self.recipe = source, recipe
        self.data_path, self.index_path = (path.with_name(path.name + end) for end in (".part", ".part.index"))
        plan = {"fingerprint": source.fingerprint(), "images": len(source), **asdict(recipe)}
        self.plan = json.dumps(plan).encode() + b"\n"
        self.pending: list[np.ndarray] = []
        self.pending_bytes, self.flushed = 0, time.monotonic()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.index: BinaryIO = _open(self.index_path, "a+b")
            with contextlib.ExitStack() as on_error:
                on_error.callback(self.index.close)
                self._lock(path)
                self.records = [self._take_up(plan)]
                self.data: BinaryIO = _open(self.data_path, "a+b")
                on_error.pop_all()
            ends = self.records[0]["offset"] + self.records[0]["size"]
            self.end = max(HEADER_SIZE, int(ends.max(initial=0)))
            if self.data_path.stat().st_size < HEADER_SIZE:
                write_all(self.data, bytes(HEADER_SIZE))
            self.data.truncate(self.end)
        except OSError as error:
            raise UserError(f"--output {path} could not be written ({error.strerror or error}); free some space or "
                            "choose another place") from None
        self.done = len(self.records[0])

    def _lock(self, path: Path) -> None:
        with contextlib.suppress(ImportError):  # Windows
            import fcntl

            try:
                fcntl.flock(self.index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"--output {path} is being written by another process; wait for it, or choose another "
                                "name") from None

    def _take_up(self, plan: dict) -> np.ndarray:
        """The records that earlier calls have finished; if there are none, starts from the beginning."""
        self.index.seek(0)
        before = self.index.read()
        line, _, rest = before.partition(b"\n")
        if before.startswith(self.plan) and self.data_path.is_file():
            records = np.frombuffer(rest[: len(rest) // RECORD.itemsize * RECORD.itemsize], dtype=RECORD)
            self.index.truncate(len(self.plan) + records.nbytes)
            return records
        if self.data_path.is_file() and self.data_path.stat().st_size > HEADER_SIZE:
            with contextlib.suppress(ValueError, AttributeError):
                found = parse_json(line)
                changed = [f"{key} was {found.get(key)!r}, now {value!r}" for key, value in plan.items()
                           if found.get(key) != value and key != "fingerprint"] or ["the images have other names"]
                raise UserError(f"{self.data_path} is an unfinished pack of something else ({'; '.join(changed)}); "
                                f"give the same settings as before, or remove it and {self.index_path.name}")
            raise UserError(f"{self.data_path} exists, and {self.index_path.name}, which would say what it is, is "
                            "damaged or missing; remove both")
        self.index.truncate(0)
        write_all(self.index, self.plan)
        return np.zeros(0, dtype=RECORD)

    def add(self, image: Encoded) -> None:
        """Append the next image of the source."""
        record = np.zeros((), dtype=RECORD)
        if image.content is not None:
            label = -1 if self.source.labels is None else self.source.labels[self.done]
            record[...] = (self.end, label, 0, len(image.content), image.crc, *image.size, *image.stored)
            write_all(self.data, image.content)
            self.end += len(image.content)
            self.pending_bytes += len(image.content)
        self.pending.append(record)
        self.done += 1
        if self.pending_bytes > FLUSH_BYTES or time.monotonic() - self.flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write to the disk the images that were added, then their index."""
        if self.pending:
            os.fsync(self.data.fileno())
            records, self.pending = np.stack(self.pending), []
            write_all(self.index, records.tobytes())
            self.records.append(records)
        self.pending_bytes, self.flushed = 0, time.monotonic()

    def skipped(self) -> list[int]:
        """The numbers, in the source, of the images that were left out."""
        self.flush()
        return np.flatnonzero(np.concatenate(self.records)["size"] == 0).tolist()

    def finish(self, path: Path) -> tuple[int, int]:
        """Write index, meta and header, and rename the file to ``path``. Returns the number of images and of bytes."""
        self.flush()
        records = np.concatenate(self.records)
        kept = np.flatnonzero(records["size"])
        if not len(kept):
            raise UserError(f"--data {self.source.title} has no image that can be decoded, so nothing was packed; give "
                            "other images")
        names = self.source.names if len(kept) == self.done else self.source.names.take(kept)
        records = records[kept]
        records["name_end"] = names.ends
        meta = {**asdict(self.recipe), "classes": self.source.classes, "source": self.source.title,
                "source_fingerprint": self.source.fingerprint()}
        padding = bytes(-self.end % 8)
        start = self.end + len(padding)
        parts = [records.tobytes(), bytes(names.block), json.dumps(meta).encode()]
        places = list(itertools.accumulate(map(len, parts), initial=start))
        header = pack_header(len(records), *places)
        tail = b"".join(parts)
        header = pack_header(len(records), *places, digest_of(header, tail))
        write_all(self.data, padding + tail)
        os.fsync(self.data.fileno())
        self.data.close()
        with _open(self.data_path, "r+b") as file:  # self.data is in append mode
            file.write(header)
            os.fsync(file.fileno())
        self.data_path.replace(path)
        self.index_path.unlink()
        return len(records), places[-1]

    def close(self) -> None:
        """Save what is done, or remove the files if nothing is. Does nothing after finish()."""
        if not self.data.closed:
            with contextlib.suppress(OSError):  # a full disk: what was written stays
                self.data.truncate(self.end)  # drop a partial record, which also makes room for the index
                self.flush()
            self.data.close()
            if not self.done:
                self.data_path.unlink()
                self.index_path.unlink()
        self.index.close()


def _open(path: Path, mode: str) -> BinaryIO:
    return open(path, mode, buffering=0, opener=no_link)  # noqa: PTH123, SIM115 - Path.open takes no opener


def write_all(file: BinaryIO, content: bytes) -> None:
    """Write all of content. An unbuffered file may write only a part, for example on a disk that is nearly full."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]
