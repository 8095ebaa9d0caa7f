"""The cluster file: clusters_K.pth, {'batches': {cluster: [indices]}} as in the original, and its JSON twin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.neighbours import compare_with_twin
from runtime.errors import UserError
from runtime.state import save_json, write_atomic

AGAIN = "cluster again with compute_knn.py"


def save_clusters(folder: Path, labels: np.ndarray, num_clusters: int, info: dict) -> Path:
    """Write folder/clusters_K.pth and its JSON twin, and return the path of the first.

    labels: integers [N] in [0, num_clusters), the cluster of each image; a cluster may be empty. info holds
    fingerprint, source, teacher_sha256, teacher_arch, transform, image_size and how the clusters were made; images,
    num_clusters and their sizes come from labels. Each file appears whole or not at all.
    """
    sizes = np.bincount(labels, minlength=num_clusters)
    if len(sizes) != num_clusters:
        raise ValueError(f"label {len(sizes) - 1} is not one of {num_clusters} clusters")
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
    path = Path(folder) / f"clusters_{num_clusters}.pth"
    twin = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    twin.unlink(missing_ok=True)  # so that a crash between the two never leaves new clusters with an old twin
    batches = {cluster: images.tolist() for cluster, images in enumerate(members)}
    write_atomic(path, lambda file: torch.save({"batches": batches}, file))
    counts = {"images": len(labels), "num_clusters": num_clusters, "empty": int((sizes == 0).sum()),
              "smallest": int(sizes.min()), "median": float(np.median(sizes)), "largest": int(sizes.max())}
    save_json({**info, **counts}, twin)
    return path


def load_clusters(path: str | os.PathLike, source_fingerprint: str, num_images: int,
                  teacher_sha256: str | None = None, flag: str = "--cluster-info") -> tuple[np.ndarray, list[str]]:
    """The cluster of each image, int32 [N], from a cluster file, the original's too; no code in it is run.

    Returns them with warnings, as data.neighbours.load_neighbours does. Raises UserError, naming the flag that gave
    the file ('' for none) and the file, where it is missing, is not of that form, was made from other images, or
    does not hold each of the num_images images once.
    """
    path = Path(path)
    name = f"{flag} {path}".strip()
    members = _read(path, name)
    # The twin first: that it is another data set says more than that some index is out of range.
    warnings = compare_with_twin(path, name, source_fingerprint, teacher_sha256, AGAIN)
    images = np.concatenate(members)
    if len(images) != num_images:
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
    labels = np.empty(num_images, dtype=np.int32)
    labels[images] = np.repeat(np.arange(len(members), dtype=np.int32), [len(member) for member in members])
    return labels, warnings


def _read(path: Path, name: str) -> list[np.ndarray]:
    """Each cluster's images, int64."""
    expected = "give the clusters_K.pth that compute_knn.py cluster writes"
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{name} {found}; {expected}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load fails in many ways on a foreign file; each means the same to a person
        raise UserError(f"{name} is not a file of plain numbers that torch can load; {expected}") from None
    batches = content.get("batches") if isinstance(content, dict) else None
    try:
        members = [_integers(batches[cluster]) for cluster in sorted(batches)] if isinstance(batches, dict) else []
    except (TypeError, ValueError, OverflowError):  # keys that do not compare, and what is no list of numbers
        members = []
    if not members or not sum(map(len, members)):
        raise UserError(f"{name} does not hold {{'batches': {{cluster: [indices]}}}}; {expected}")
    return members


def _integers(member: Any) -> np.ndarray:
    indices = np.asarray(member)
    if indices.size == 0:
        return np.empty(0, dtype=np.int64)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise ValueError("not a list of whole numbers")
    return indices.astype(np.int64)
