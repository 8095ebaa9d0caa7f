"""The cluster file: clusters_K.pth with {'batches': {cluster: [indices]}}, as in the original, and its JSON twin."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.neighbours import compare_with_twin, read_twin, said_left_out
from runtime.archive import check_archive, is_archive
from runtime.errors import Damaged, UserError
from runtime.regular import expect_file, open_regular
from runtime.state import save_json, write_atomic

GIVE = "give the clusters_K.pth that compute_knn.py cluster writes"
AGAIN = "cluster again with compute_knn.py"
FORM = "{'batches': {cluster: [indices]}}"
NO_CLUSTER = -1  # of an image that could not be opened


def save_clusters(folder: Path, labels: np.ndarray, num_clusters: int, info: dict) -> Path:
    """Write folder/clusters_K.pth and its JSON twin, and return the path of the first.

    labels: integers [N] in [0, num_clusters), the cluster of each image, or NO_CLUSTER; a cluster may be empty. info
    holds fingerprint, source, teacher_sha256, teacher_arch, feature, transform, image_size and the settings of the
    clustering; images, left_out, num_clusters and the sizes are computed from labels. Each file is written atomically.
    """
    kept = np.flatnonzero(labels != NO_CLUSTER)
    sizes = np.bincount(labels[kept], minlength=num_clusters)
    if len(sizes) != num_clusters:
        raise ValueError(f"label {len(sizes) - 1} is not one of {num_clusters} clusters")
    members = np.split(kept[np.argsort(labels[kept], kind="stable")], np.cumsum(sizes)[:-1])
    path = Path(folder) / f"clusters_{num_clusters}.pth"
    twin = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    twin.unlink(missing_ok=True)  # so that a crash between the two never leaves new clusters with an old twin
    batches = {cluster: images.tolist() for cluster, images in enumerate(members)}
    write_atomic(path, lambda file: torch.save({"batches": batches}, file))
    counts = {"images": len(labels), "left_out": len(labels) - len(kept), "num_clusters": num_clusters,
              "empty": int((sizes == 0).sum()),
              "smallest": int(sizes.min()), "median": float(np.median(sizes)), "largest": int(sizes.max())}
    save_json({**info, **counts}, twin)
    return path


def load_clusters(path: str | os.PathLike, source_fingerprint: str, num_images: int,
                  teacher: Mapping[str, Any] | None = None, flag: str = "--cluster-info",
                  ) -> tuple[np.ndarray, list[str]]:
    """The cluster of each image, int32 [N], from a cluster file of this project or the original, read without running
    code from it. It is NO_CLUSTER for images that the file leaves out, whose number the JSON twin records.

    Returns it with warnings, as data.neighbours.load_neighbours does. Raises UserError, naming the flag that gave
    the file ('' for none) and the file, if the file is missing, has another form, was made from other images, or does
    not contain each of the num_images images exactly once, except those that it leaves out.
    """
    path = Path(path)
    name = f"{flag} {path}".strip()
    members, converted = _read(path, name)
    # Check the twin first: "made from other images" explains more than "an index is out of range".
    warnings = converted + compare_with_twin(path, name, source_fingerprint, teacher, AGAIN)
    images = np.concatenate(members)
    left_out = said_left_out(read_twin(path))
    if len(images) + left_out != num_images:
        raise UserError(f"{name} holds {len(images):,} images and --data has {num_images:,}; give the data it was "
                        f"made from, or {AGAIN}")
    outside = images[(images < 0) | (images >= num_images)]
    if len(outside):
        raise UserError(f"{name} holds image {outside[0]}, outside the {num_images:,} images of --data; the file is "
                        f"damaged, so {AGAIN}")
    counts = np.bincount(images, minlength=num_images)
    if counts.max() > 1:
        raise UserError(f"{name} holds image {counts.argmax()} {counts.max()} times and lacks others; the file is "
                        f"damaged, so {AGAIN}")
    labels = np.full(num_images, NO_CLUSTER, dtype=np.int32)
    labels[images] = np.repeat(np.arange(len(members), dtype=np.int32), [len(member) for member in members])
    return labels, warnings


def clusters_fingerprint(labels: np.ndarray) -> str:
    """SHA-256, in hex, of the cluster of each image, int32 [N]."""
    return hashlib.sha256(labels.astype("<i4").data).hexdigest()


def _read(path: Path, name: str) -> tuple[list[np.ndarray], list[str]]:
    """The images of each cluster, int64, and a sentence about each deviation from the format that was corrected."""
    expect_file(path, name, GIVE)
    try:
        if is_archive(path):
            check_archive(path)
        with open_regular(path) as file:  # given a path, torch opens only names that are valid UTF-8
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Damaged as error:
        raise UserError(f"{name} is damaged or cut short: {error}; {AGAIN}") from None
    except Exception:  # torch.load raises many kinds of errors for other files; all mean the same to the user
        raise UserError(f"{name} is not a file of plain numbers that torch can load; {GIVE}") from None
    batches = content.get("batches") if isinstance(content, dict) else None
    if not isinstance(batches, dict) or not batches:
        raise UserError(f"{name} does not hold {FORM}; {GIVE}")
    numbers, notes = _numbered(batches, name)
    members = [_integers(batches[key], f"{name}: cluster {key!r}") for key in numbers]
    if not sum(map(len, members)):
        raise UserError(f"{name} holds no images, expected {FORM} with some; {GIVE}")
    if kinds := sorted({type(member).__name__ for member in batches.values()} - {"list"}):
        notes.append(f"{name} holds a {' or '.join(kinds)} instead of a list of indices, which was read as a list")
    return members, notes


def _numbered(batches: dict[Any, Any], name: str) -> tuple[list[Any], list[str]]:
    """The keys of the clusters in the order of their numbers, and a note if the keys are text."""
    if all(type(key) is int for key in batches):
        return sorted(batches), []
    numbers = {key: int(key) for key in batches if isinstance(key, str) and re.fullmatch(r"[0-9]{1,9}", key)}
    if len(set(numbers.values())) < len(batches):
        odd = next((key for key in batches if key not in numbers), next(iter(batches)))
        raise UserError(f"{name} has a cluster called {str(odd)[:40]!r}, expected {FORM} with numbers as the keys; "
                        f"{AGAIN}")
    return sorted(numbers, key=numbers.get), [f"{name} has text ('{next(iter(numbers))}') for the numbers of clusters, "
                                              "which was read as numbers"]


def _integers(member: Any, name: str) -> np.ndarray:
    """A list, tuple or tensor of whole numbers as int64 [n]."""
    try:
        indices = np.asarray(member)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # not a list of numbers
        indices = np.empty(0, object)
    if indices.ndim == 1 and indices.size == 0 and indices.dtype != object:
        return np.empty(0, dtype=np.int64)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        kind = getattr(member, "dtype", type(member).__name__)
        raise UserError(f"{name} holds a {kind} that does not consist of image indices, expected {FORM}; {AGAIN}")
    return indices.astype(np.int64)
