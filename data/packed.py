"""Packed files, which hold a whole image set: the format, and the source that reads it.

    header    128 bytes: magic, version, offsets of the parts, size of the file, SHA-256 of header, index and meta
    data      the records, one after another
    index     a RECORD for each image, then the names as one block, each followed by a newline
    meta      JSON: mode, short_side, quality, classes, and what the file was made from

Numbers are little-endian. The digest covers each record through its CRC-32, which the index holds. The index is
memory-mapped, so that all processes of a machine share it and opening costs nothing per image. Records are
read with os.pread instead: a map of the data would count all of it as the memory of every worker, and a failing disk
would kill the worker (SIGBUS), where pread raises an error with a reason.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.images import BadImage, open_rgb
from data.sources import ImageSource, Names
from runtime.errors import UserError
from runtime.regular import open_regular
from runtime.state import parse_json

MAGIC, VERSION = b"\x89CoSSpk\n", 1
# magic, version, 0, number of records, start of index (= end of data), of names, of meta, size of the file, digest
HEADER = struct.Struct("<8sII5Q32s")
HEADER_SIZE = 128
MODES = ("original", "jpeg", "raw")
RECORD = np.dtype([
    ("offset", "<u8"), ("label", "<i8"),  # label -1: no label
    ("name_end", "<i8"),
    ("size", "<u4"), ("crc", "<u4"),
    ("width", "<u4"), ("height", "<u4"),  # of the original image, after EXIF rotation
    ("stored_width", "<u4"), ("stored_height", "<u4"),
])  # fmt: skip
AGAIN = "copy it again, or pack again with pack_dataset.py"


def is_packed(path: Path) -> bool:
    """Whether to read a file as a packed one: it has the magic bytes, or its name ends in .pack."""
    try:
        with open_regular(path) as file:
            return file.read(len(MAGIC)) == MAGIC or path.suffix == ".pack"
    except OSError:
        return path.suffix == ".pack"


class PackedSource(ImageSource):
    """The images of a packed file. Pickling stores the path, and unpickling opens the file again.

    mode is 'original' (the files unchanged), 'jpeg' (re-encoded at short_side) or 'raw' (decoded pixels at
    short_side). Raises UserError, naming --data and the file, if it is not a complete packed file.
    """

    def __init__(self, path: str | os.PathLike, check: bool = True):
        self.path = Path(path).absolute()
        try:
            with open_regular(path) as file:
                self._file = os.dup(file.fileno())
        except OSError as error:
            raise UserError(f"--data {path} could not be opened ({error.strerror or error})") from None
        try:
            index = _Index(Path(path), self._file, check)
        except BaseException:
            self.close()
            raise
        self.records, self.meta, self.rows, self.digest = index.records, index.meta, None, index.digest
        self.mode, self.short_side = index.meta["mode"], index.meta["short_side"]
        what = "files unchanged" if self.mode == "original" else f"{self.mode}, short side {self.short_side}"
        classes, labels = index.meta["classes"], index.records["label"]
        super().__init__(index.names, labels if classes else None, classes, f"{path} ({what})")
        self._packed_labels = self.labels

    def open(self, i: int) -> Image.Image:
        if self.mode == "raw":
            return Image.fromarray(self._raw(i))
        return open_rgb(io.BytesIO(self._read(self._row(i))))

    def encoded(self, i: int) -> bytes | None:
        """The content of the image file, as packed; None in mode raw."""
        return None if self.mode == "raw" else self._read(self._row(i))

    def pixels(self, i: int) -> torch.Tensor:
        """Image i as uint8 [3, H, W]; in mode raw without decoding, and in channels-last memory."""
        return torch.from_numpy(self._raw(i)).permute(2, 0, 1) if self.mode == "raw" else super().pixels(i)

    def location(self, i: int) -> str:
        return f"{self.path}: record {self.names[i]}"

    def identity(self, times: bool = True) -> str:  # noqa: ARG002 - the digest is of its content
        """The fingerprint, which equals the folder's, and the digest, since the pixels depend on the packing."""
        return f"{self.fingerprint()} {self.digest.hex()}"

    def take(self, indices: np.ndarray) -> PackedSource:
        indices = np.asarray(indices, dtype=np.int64)
        rows = indices if self.rows is None else self.rows[indices]
        labels = None if self.labels is None else self.labels[indices]
        return _reopen(self.path, self.digest, self.title, rows, labels, self.classes)

    def damaged(self) -> Iterator[tuple[int, str | None]]:
        """Read every record in order and yield (i, None), or (i, reason) if it does not match its checksum."""
        for i in range(len(self)):
            try:
                self._read(self._row(i))
                yield i, None
            except BadImage as error:
                yield i, str(error)

    def _row(self, i: int) -> int:
        i = range(len(self))[i]  # negative indices, and IndexError past the end
        return i if self.rows is None else int(self.rows[i])

    def _read(self, row: int) -> bytes:
        record = self.records[row]
        try:
            content = _pread(self._file, int(record["size"]), int(record["offset"]))
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from None
        if len(content) != record["size"]:
            raise BadImage("the packed file ends within this record")
        if zlib.crc32(content) != record["crc"]:
            raise BadImage("its content does not match its checksum")
        return content

    def _raw(self, i: int) -> np.ndarray:
        """uint8 [H, W, 3]."""
        row = self._row(i)
        record = self.records[row]
        pixels = np.frombuffer(bytearray(self._read(row)), dtype=np.uint8)  # writable, as torch expects
        return pixels.reshape(record["stored_height"], record["stored_width"], 3)

    def close(self) -> None:
        """Close the file; the source cannot be used afterwards."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self):
        if hasattr(self, "_file"):
            self.close()

    def __reduce__(self) -> tuple:
        if self.rows is None and self.labels is self._packed_labels:
            return _reopen, (self.path, self.digest, self.title)
        return _reopen, (self.path, self.digest, self.title, self.rows, self.labels, self.classes)


def _reopen(path: Path, digest: bytes, title: str, rows: np.ndarray | None = None, labels: np.ndarray | None = None,
            classes: list[str] | None = None) -> PackedSource:
    """Unpickle a source. The process that first opened the file has checked that the index matches the digest."""
    source = PackedSource(path, check=False)
    if source.digest != digest:
        raise UserError(f"--data {path} was replaced by another packed file while it was in use; start again")
    source.title = title
    if rows is not None:
        source.rows, source.names = rows, source.names.take(rows)
    if classes is not None:
        source.labels, source.classes = labels, list(classes)
    return source


def _pread(file: int, size: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file, size, offset)
    os.lseek(file, offset, os.SEEK_SET)  # Windows, where processes do not share the position of a file
    return os.read(file, size)


class _Index:
    """Reads and checks header, index and meta of a packed file: records RECORD [N], names, meta."""

    def __init__(self, path: Path, file: int, check: bool):
        header = _pread(file, HEADER_SIZE, 0)
        if len(header) < HEADER_SIZE or not header.startswith(MAGIC):
            raise UserError(f"--data {path} is not a packed file (it does not begin with the magic bytes of one); "
                            "give one that pack_dataset.py has written")
        _, version, _, count, start, names, meta, end, self.digest = HEADER.unpack_from(header)
        if version != VERSION:
            raise UserError(f"--data {path} is a packed file of version {version} and this code reads version "
                            f"{VERSION}; pack the images again with pack_dataset.py")
        size = os.fstat(file).st_size
        if size != end:
            raise UserError(f"--data {path} is damaged: it has {size:,} bytes, expected {end:,}; {AGAIN}")
        whole = HEADER_SIZE <= start <= names <= meta <= end and names - start == count * RECORD.itemsize and count
        if whole:
            with os.fdopen(os.dup(file), "rb") as again:  # not by name, which may belong to another file by now
                tail = np.memmap(again, dtype=np.uint8, mode="r", offset=start).view(np.ndarray)
            whole = not check or digest_of(header, tail.data) == self.digest
        if not whole:
            raise UserError(f"--data {path} is damaged: its index does not match its checksum; {AGAIN}")
        self.records = tail[:names - start].view(RECORD)
        self.names = Names.of_block(tail[names - start:meta - start].data, self.records["name_end"])
        self.meta: dict[str, Any] = _parsed(bytes(tail[meta - start:]))
        problem = _unsound(self.records, self.names, self.meta, start) if check else ""
        if problem:
            raise UserError(f"--data {path} is damaged: {problem}; {AGAIN}")


def _parsed(text: bytes) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None


def _unsound(records: np.ndarray, names: Names, meta: Any, end: int) -> str:
    """What is invalid in an index whose checksum is right; '' if nothing is. ``end``: where the records end."""
    if not (isinstance(meta, dict) and meta.get("mode") in MODES and isinstance(meta.get("classes"), list)
            and isinstance(meta.get("short_side"), int | None)
            and all(isinstance(name, str) for name in meta["classes"])):
        return "its meta lacks a valid mode, short side or list of classes"
    classes, labels = len(meta["classes"]), records["label"]
    if labels.min() < (0 if classes else -1) or labels.max() >= classes:
        return f"a label is outside its {classes:,} classes"
    ends = records["name_end"]
    if ends[0] < 1 or (np.diff(ends) < 1).any() or ends[-1] != len(names.block) or (
            np.frombuffer(names.block, np.uint8)[ends - 1] != ord("\n")).any():
        return "its names do not end at the places that its index gives"
    sizes, starts = records["size"].astype(np.uint64), records["offset"]
    if ((starts < HEADER_SIZE) | (starts > end) | (sizes > np.uint64(end) - starts)).any():
        return "a record lies outside its data"
    pixels = records["stored_width"].astype(np.uint64) * records["stored_height"].astype(np.uint64)
    if meta["mode"] == "raw" and (pixels * np.uint64(3) != sizes).any():
        return "the size of a record is not that of its pixels"
    return ""


def pack_header(count: int, start: int, names: int, meta: int, end: int, digest: bytes = bytes(32)) -> bytes:
    """The header of a packed file, 128 bytes; offsets are in bytes from the start of the file."""
    return HEADER.pack(MAGIC, VERSION, 0, count, start, names, meta, end, digest).ljust(HEADER_SIZE, b"\0")


def digest_of(header: bytes, tail: bytes | memoryview) -> bytes:
    """SHA-256 of the header up to its digest, and of everything after the data."""
    digest = hashlib.sha256(header[: HEADER.size - 32])
    digest.update(tail)
    return digest.digest()
