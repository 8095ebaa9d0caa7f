"""The neighbour file: NAME.npy, int64 [N, k], and its JSON twin NAME.json, which says which data it belongs to."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import Damaged, UserError
from runtime.npy import CHECKSUMS, Checksums, holds_an_object, map_array, pieces, read_checksums, whole_json
from runtime.regular import expect_file
from runtime.state import save_json

LEFT_OUT = -1  # fills the row of an image that could not be opened
GIVE = "give the closek_info.npy that compute_knn.py writes"
MINE = "mine again with compute_knn.py"


def place_neighbours(rows: Path, folder: Path, name: str, info: dict, checksums: Checksums) -> Path:
    """Move ``rows``, a complete .npy file int64 [N, k] on the same disk, to folder/name.npy and write its JSON twin.

    name is closek_info (nearest first) or fark_info (farthest first); an image is not among its own neighbours. info
    holds fingerprint, source, left_out (the number of such rows, see left_out_rows), teacher_sha256, teacher_arch,
    feature, transform, image_size and metric; images and k are taken from the file. ``checksums`` are those of its rows
    (runtime.npy), and are kept in the twin. Returns the new path.
    """
    path = Path(folder) / f"{name}.npy"
    images, k = map_array(rows).shape
    twin = path.with_suffix(".json")
    twin.unlink(missing_ok=True)  # so that a crash between the two never leaves new numbers with an old twin
    rows.replace(path)
    save_json({**info, "images": images, "k": k, CHECKSUMS: checksums}, twin)
    return path


def refuse_other_file(path: Path, info: dict) -> None:
    """Raise UserError if ``path``, which is about to be written again, is a neighbour or cluster file that differs from
    ``info``: made from other images, by another network, or with other settings."""
    if not path.exists():
        return
    twin = read_twin(path)
    changed = None if twin is None else [f"{key} was {twin.get(key)!r}, now {value!r}" for key, value in info.items()
                                         if twin.get(key) != value]
    if changed is None or changed:
        found = f"was made differently ({'; '.join(changed[:3])})" if changed else (
            f"has no readable {path.with_suffix('.json').name} beside it, which would say what it is")
        raise UserError(f"--output {path} exists and {found}; choose another folder, or remove it")


def load_neighbours(
    path: str | os.PathLike,
    source_fingerprint: str,
    num_images: int,
    total_k: int | None = None,
    teacher: Mapping[str, Any] | None = None,
    flag: str = "--closek-info",
) -> tuple[np.ndarray, list[str]]:
    """Memory-map a neighbour file, integer [N, k], after checking that it belongs to the data.

    ``teacher``: the teacher_sha256, feature and image_size that its JSON twin should record; None: any are accepted.
    Returns it with warnings, one sentence each: no JSON twin (the original writes none), another teacher, or another
    image size. Raises UserError, naming the flag ('' for none) and the file, if the file is missing, is not an
    integer [N, k] array, has a different number of images or fewer than total_k columns, has an index outside
    [0, num_images) or of an image that it leaves out, or was made from other images or by another feature of the
    teacher.
    """
    path = Path(path)
    name = f"{flag} {path}".strip()
    ids = _map_integers(path, name)
    if len(ids) != num_images:
        raise UserError(
            f"{name} holds neighbours of {len(ids):,} images and --data has {num_images:,}; "
            f"give the data it was made from, or {MINE}"
        )
    if total_k is not None and ids.shape[1] < total_k:
        raise UserError(
            f"{name} holds {ids.shape[1]} neighbours per image and --total-k asks for "
            f"{total_k}; lower --total-k, or {MINE} and a larger k"
        )
    # Check the twin first: "made from other images" explains more than "an index is out of range".
    warnings = compare_with_twin(path, name, source_fingerprint, teacher, MINE)
    _check_rows(path, name, ids, total_k)
    _check_left_out(name, ids, read_twin(path))
    _unmap(ids)
    return ids, warnings


def neighbours_fingerprint(ids: np.ndarray, used: int) -> str:
    """SHA-256, in hex, of the first ``used`` columns of a neighbour file, [N, k], independent of its integer type."""
    digest = hashlib.sha256()
    for _, rows in pieces(ids):
        digest.update(np.ascontiguousarray(rows[:, :used], "<i8").data)
    _unmap(ids)
    return digest.hexdigest()


def refuse_composed_batches(path: str | os.PathLike, flag: str) -> None:
    """Raise UserError if ``path`` is an .npy file of the original's create_offline_batches.py, with the images of
    each epoch and rank as a pickle. Other files are checked by their reader."""
    if holds_an_object(path):
        raise UserError(f"{flag} {path} holds batches that the original's create_offline_batches.py composed, as "
                        "Python objects, which are not opened because that could run code; --sampler cluster+cf "
                        "composes such batches itself: give the files that they were made from, --closek-info "
                        "closek_info.npy --cluster-info clusters_K.pth, with -b and --nearest-k")


def left_out_rows(ids: np.ndarray) -> np.ndarray:
    """int64 [m]: the images that a neighbour file, [N, k], leaves out since they could not be opened when it was made.
    Their rows are filled with LEFT_OUT, and no other row contains them."""
    return np.flatnonzero(ids[:, 0] == LEFT_OUT)


def same_left_out(files: Mapping[str, np.ndarray]) -> np.ndarray:
    """The images that every one of ``files``, {flag: images left out}, leaves out, int64 [m]. Raises UserError if the
    files differ in that."""
    (first, gone), *others = files.items()
    for flag, found in others:
        if not np.array_equal(gone, found):
            raise UserError(f"{first} leaves out {len(gone):,} images that could not be opened and {flag} leaves out "
                            f"{len(found):,}, but not the same ones; make both again from the same images")
    return gone


class KeptNeighbours:
    """The neighbour table [n, k] of only the n images ``kept``, int64 [n], of ``ids`` [N, k], which are renumbered from
    0 to n - 1."""

    def __init__(self, ids: np.ndarray, kept: np.ndarray):
        self.ids, self.kept, self.shape = ids, kept, (len(kept), ids.shape[1])
        self.numbers = np.full(len(ids), LEFT_OUT)
        self.numbers[kept] = np.arange(len(kept))

    def __len__(self) -> int:
        return len(self.kept)


def row_reader(table: np.ndarray | KeptNeighbours) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """read(rows [b], columns [b, n]) -> table[rows[:, None], columns], int64 [b, n].

    If the table is a memory map, its rows are read from the file, which stays open: touching one row of the map can map
    2 MB of it into the process, and all of it in an epoch.
    """
    if isinstance(table, KeptNeighbours):
        whole, kept, numbers = row_reader(table.ids), table.kept, table.numbers
        return lambda rows, columns: numbers[whole(kept[rows], columns)]
    is_whole_map = isinstance(table, np.memmap) and isinstance(table.base, mmap.mmap) and table.flags.c_contiguous
    if not (is_whole_map and hasattr(os, "pread")):
        return lambda rows, columns: table[rows[:, None], columns].astype(np.int64)
    file = Path(table.filename).open("rb", buffering=0)  # noqa: SIM115  (closed with the reader)
    width, dtype, offset = table.shape[1] * table.dtype.itemsize, table.dtype, table.offset

    def read(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        lines = b"".join(os.pread(file.fileno(), width, offset + row * width) for row in rows.tolist())
        return np.take_along_axis(np.frombuffer(lines, dtype).reshape(len(rows), -1), columns, axis=1).astype(np.int64)

    return read


def _unmap(ids: np.ndarray) -> None:
    """Release the pages of a memory map that this process has read."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        ids._mmap.madvise(mmap.MADV_DONTNEED)


def _map_integers(path: Path, name: str) -> np.ndarray:
    expect_file(path, name, GIVE)
    try:
        ids = map_array(path)
    except (OSError, Damaged) as error:
        raise UserError(f"{name} is not a complete .npy file of numbers ({error}); {GIVE}") from None
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise UserError(f"{name} holds {ids.dtype} {list(ids.shape)}, expected integers [images, k]; {GIVE}")
    return ids


def _check_rows(path: Path, name: str, ids: np.ndarray, used: int | None) -> None:
    """Check all rows in one pass: their checksums (if the twin has them), the range of the indices, that the ``used``
    columns contain neither the image itself nor an image twice."""
    own, double = [], []
    try:
        twin = read_twin(path)
        for first, rows in pieces(ids, None if twin is None else read_checksums(twin.get(CHECKSUMS))):
            there = (rows != LEFT_OUT).any(axis=1)
            wrong = ((rows < 0) | (rows >= len(ids))) & there[:, None]
            if wrong.any():
                row, column = np.argwhere(wrong)[0]
                raise UserError(
                    f"{name} gives image {first + row} the neighbour {rows[row, column]}, outside "
                    f"the {len(ids):,} images of --data; the file is damaged or not a neighbour file, so {MINE}"
                )
            image, rows = first + np.flatnonzero(there), np.sort(rows[there, :used], axis=1)
            own.append(image[(rows == image[:, None]).any(axis=1)])
            double.append(image[(rows[:, 1:] == rows[:, :-1]).any(axis=1)])
    except Damaged as error:
        raise UserError(f"{name} is damaged: {error}; {MINE}") from None
    own, double = np.concatenate(own or [[]]), np.concatenate(double or [[]])
    problems = [f"{len(rows):,} images {what} (image {rows[0]} first)" for rows, what in
                ((own, "are their own neighbour"), (double, "have a neighbour twice")) if len(rows)]
    if problems:
        raise UserError(f"{name} is not a valid neighbour file: {' and '.join(problems)}; {MINE}")


def _check_left_out(name: str, ids: np.ndarray, twin: dict | None) -> None:
    gone = left_out_rows(ids)
    if twin is not None and len(gone) != said_left_out(twin):
        raise UserError(f"{name} leaves out {len(gone):,} images, but its .json says {said_left_out(twin):,}; "
                        f"the two files do not belong together, so {MINE}")
    if len(gone) == len(ids):
        raise UserError(f"{name} leaves out all of its {len(ids):,} images; {MINE}")
    for first, rows in pieces(ids) if len(gone) else ():
        wrong = np.isin(rows, gone)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise UserError(f"{name} gives image {first + row} the neighbour {rows[row, column]}, which it leaves out;"
                            f" the file is damaged, so {MINE}")


def read_twin(path: Path) -> dict | None:
    """The JSON twin of a neighbour or cluster file; None if it is missing or unreadable."""
    try:
        return whole_json(path.with_suffix(".json"))
    except (OSError, Damaged):
        return None


def said_left_out(twin: dict | None) -> int:
    """The number of images that a neighbour or cluster file leaves out, according to its JSON twin."""
    said = (twin or {}).get("left_out", 0)
    return said if isinstance(said, int) and said >= 0 else 0


def compare_with_twin(path: Path, name: str, source_fingerprint: str, teacher: Mapping[str, Any] | None,
                      remedy: str) -> list[str]:
    """Warnings about a file that has no JSON twin or was made with another teacher; see load_neighbours.

    Raises UserError, which calls the file `name` and suggests `remedy`, if the twin is unreadable or the file was
    made from other images or by another feature of the teacher.
    """
    twin = path.with_suffix(".json")
    if not twin.is_file():
        return [f"{path} has no {twin.name} beside it, so it is unknown whether it belongs to --data"]
    info = read_twin(path)
    if info is None or "fingerprint" not in info:
        raise UserError(
            f"{name}: {twin} beside it is unreadable or has no fingerprint; {remedy}, or "
            "remove the .json to continue without this check"
        )
    if info["fingerprint"] != source_fingerprint:
        raise UserError(
            f"{name} was made from other images ({info.get('source', 'unknown')}) than --data; give the data that it "
            f"was made from, or {remedy}"
        )
    return _compare_teacher(path, name, info, teacher, remedy) if teacher and info.get("teacher_sha256") else []


def _compare_teacher(path: Path, name: str, info: Mapping[str, Any], teacher: Mapping[str, Any], remedy: str,
                     ) -> list[str]:
    digest = info["teacher_sha256"]
    if digest != teacher["teacher_sha256"]:
        arch = info.get("teacher_arch", "unknown")
        return [f"{path} was made with another teacher ({arch}, SHA-256 {str(digest)[:12]}) than the current one"]
    (made, used), (old, new) = ((info.get(key), teacher.get(key)) for key in ("feature", "image_size"))
    if made and used and made != used:
        raise UserError(f"{name} was made with the teacher's feature '{made}', but the current one is '{used}'; give "
                        f"--teacher-feature {made}, or {remedy} --feature {used}")
    return [f"{path} was made with images of {old} pixels, but the teacher now gets {new}"] * bool(
        old and new and old != new)
