"""The neighbour file: NAME.npy, int64 [N, k], and NAME.json, which says to what data it belongs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from runtime.errors import UserError
from runtime.state import save_json, write_atomic

ROWS_PER_CHUNK = 65536
MINE = "mine again with compute_knn.py"


def save_neighbours(folder: Path, name: str, ids: np.ndarray, info: dict) -> Path:
    """Write folder/name.npy and its JSON twin, and return the path of the first.

    name is closek_info (nearest first) or fark_info (farthest first); ids is int64 [N, k], without the image
    itself. info holds fingerprint, source, teacher_sha256, teacher_arch, transform, image_size and metric;
    images and k are taken from ids. Each file appears whole or not at all.
    """
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"neighbours are integers [N, k], not {ids.dtype} {list(ids.shape)}")
    folder = Path(folder)
    path = folder / f"{name}.npy"
    twin = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    twin.unlink(missing_ok=True)  # so that a crash between the two never leaves new numbers with an old twin
    write_atomic(path, lambda file: np.save(file, ids.astype(np.int64, copy=False)))
    save_json({**info, "images": ids.shape[0], "k": ids.shape[1]}, twin)
    return path


def place_neighbours(rows: Path, folder: Path, name: str, info: dict) -> Path:
    """Move ``rows``, a whole .npy file int64 [N, k] on the same disk, to folder/name.npy and write its JSON twin.

    As save_neighbours, for a file that several processes wrote; returns its new path.
    """
    path = Path(folder) / f"{name}.npy"
    images, k = np.load(rows, mmap_mode="r", allow_pickle=False).shape
    twin = path.with_suffix(".json")
    twin.unlink(missing_ok=True)
    rows.replace(path)
    save_json({**info, "images": images, "k": k}, twin)
    return path


def load_neighbours(
    path: str | os.PathLike,
    source_fingerprint: str,
    num_images: int,
    total_k: int,
    teacher_sha256: str | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Memory-map a neighbour file, integer [N, k], after checking that it belongs to the data.

    Returns it with warnings, one sentence each: no JSON twin, as beside the original's files, or another
    teacher's neighbours (teacher_sha256 None: any teacher's will do). Raises UserError, naming --closek-info
    and the file, where it is missing, is no integer [N, k] array, has another number of images or fewer than
    total_k columns, points outside [0, num_images), or was made from other images.
    """
    path = Path(path)
    ids = _map_integers(path)
    if len(ids) != num_images:
        raise UserError(
            f"--closek-info {path} holds neighbours of {len(ids):,} images and --data has {num_images:,}; "
            f"give the data it was made from, or {MINE}"
        )
    if ids.shape[1] < total_k:
        raise UserError(
            f"--closek-info {path} holds {ids.shape[1]} neighbours an image and --total-k asks for "
            f"{total_k}; lower --total-k, or {MINE} and a larger k"
        )
    # The twin first: that it is another data set says more than that some index is out of range.
    warnings = _compare_with_twin(path, source_fingerprint, teacher_sha256)
    _check_range(path, ids)
    return ids, warnings


def _map_integers(path: Path) -> np.ndarray:
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"--closek-info {path} {found}; give the closek_info.npy that compute_knn.py writes")
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError):
        raise UserError(
            f"--closek-info {path} is not a whole .npy file of numbers; "
            "give the closek_info.npy that compute_knn.py writes"
        ) from None
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or ids.dtype.kind not in "iu":
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else "an .npz archive"
        raise UserError(
            f"--closek-info {path} holds {found} where integers [images, k] belong; "
            "give the closek_info.npy that compute_knn.py writes"
        )
    return ids


def _check_range(path: Path, ids: np.ndarray) -> None:
    for start in range(0, len(ids), ROWS_PER_CHUNK):  # ImageNet's file is 4 GB; it need not be in memory at once
        chunk = ids[start : start + ROWS_PER_CHUNK]
        wrong = (chunk < 0) | (chunk >= len(ids))
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise UserError(
                f"--closek-info {path} gives image {start + row} the neighbour {chunk[row, column]}, outside "
                f"the {len(ids):,} images of --data; the file is damaged or not a neighbour file, so {MINE}"
            )


def _compare_with_twin(path: Path, source_fingerprint: str, teacher_sha256: str | None) -> list[str]:
    twin = path.with_suffix(".json")
    if not twin.is_file():
        return [f"{path} has no {twin.name} beside it, so that it belongs to --data cannot be checked"]
    try:
        info = json.loads(twin.read_text())
        fingerprint, teacher = info["fingerprint"], info.get("teacher_sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"--closek-info {path}: {twin} beside it cannot be read or has no fingerprint; {MINE}, or "
            "take the .json away to go on unchecked"
        ) from None
    if fingerprint != source_fingerprint:
        raise UserError(
            f"--closek-info {path} was made from other images ({info.get('source', 'unknown')}) than those "
            f"of --data; give the data it was made from, or {MINE}"
        )
    if teacher_sha256 and teacher and teacher != teacher_sha256:
        arch = info.get("teacher_arch", "unknown")
        return [f"{path} was mined with another teacher ({arch}, SHA-256 {teacher[:12]}) than the one in use"]
    return []
