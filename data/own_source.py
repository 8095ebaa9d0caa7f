"""The user's own data set, FILE.py:NAME, as a source of images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.images import BadImage, open_rgb, read_bytes
from data.sources import ImageSource
from runtime.own import Own, load_own

WANTED = ("return a data set with len() whose [i] is a PIL image, a path or a uint8 array [H, W, 3], alone or first in "
          "a tuple (docs/DATA.md)")
PROBES = 16


class OwnSource(ImageSource):
    """The images of the data set that NAME(split) returns, and its attributes ``names``, ``classes`` and ``labels`` (or
    ``targets``, torchvision's name), if it has them. A worker that is not forked creates the data set again."""

    def __init__(self, own: Own, split: str) -> None:
        """Raises :class:`UserError` if NAME does not return a data set, or if its first image cannot be read."""
        self.own, self.split, self.rows = own, split, None
        with own.blamed(f"while it creates the data set for {split!r}"):
            self.dataset = own.value(split)
            count = len(self.dataset) if isinstance(self.dataset, Sequence) or hasattr(self.dataset, "__len__") else 0
            names = getattr(self.dataset, "names", None) or (f"{own.short}/{split}/{i:08d}" for i in range(count))
            names = [str(name) for name in names]
            labels = next((getattr(self.dataset, x) for x in ("labels", "targets") if hasattr(self.dataset, x)), None)
            labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        if not count or not hasattr(self.dataset, "__getitem__"):
            raise own.error(f"returns a {type(self.dataset).__name__} with {count} images for {split!r}", WANTED)
        for what, found in (("names", names), ("labels", labels)):
            if found is not None and len(found) != count:
                raise own.error(f"has {count} images and {len(found)} {what}", "give one for each image, in order")
        classes = [str(x) for x in getattr(self.dataset, "classes", None) or range(int(labels.max()) + 1)] if (
            labels is not None) else []
        if labels is not None and (labels.min() < 0 or labels.max() >= len(classes)):
            raise own.error(f"has labels from {labels.min()} to {labels.max()} and {len(classes)} classes",
                            "number the classes from 0")
        super().__init__(names, labels, classes, f"{own.short}, {split}")
        with own.blamed("when it opens the first image"):
            try:
                self.open(0)
            except BadImage as error:
                raise own.error(f"cannot open image 0 ({error})", WANTED) from None

    def item(self, i: int) -> Any:
        """The entry of the data set for image i, without its label. Raises BadImage for any exception of its code."""
        try:
            found = self.dataset[int(i if self.rows is None else self.rows[i])]
        except Exception as error:
            raise BadImage(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from None
        return found[0] if isinstance(found, tuple | list) and found else found

    def open(self, i: int) -> Image.Image:
        found = self.item(i)
        if isinstance(found, str | Path):
            return open_rgb(found)
        if isinstance(found, Image.Image):
            return found.convert("RGB")
        pixels = found.numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
        if pixels.ndim == 3 and pixels.shape[0] == 3 and isinstance(found, torch.Tensor):
            pixels = pixels.transpose(1, 2, 0)
        if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3))):
            raise BadImage(f"{type(found).__name__} {pixels.dtype} {list(pixels.shape)} is not an image")
        pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
        return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")

    def encoded(self, i: int) -> bytes | None:
        """The content of the image's file if the data set returns a path; otherwise None."""
        found = self.item(i)
        return read_bytes(found) if isinstance(found, str | Path) else None

    def identity(self, times: bool = True) -> str:  # noqa: ARG002 - the pixels are of its content
        """The fingerprint, and the SHA-256 of the code and the pixels of a few images, as files may change."""
        if self._identity is None:
            digest = hashlib.sha256(self.own.sha256.encode())
            for i in np.unique(np.linspace(0, len(self) - 1, PROBES).round().astype(int)):
                try:
                    digest.update(self.open(int(i)).tobytes())
                except BadImage as error:
                    digest.update(str(error).encode())
            self._identity = f"{self.fingerprint()} {digest.hexdigest()}"
        return self._identity

    def take(self, indices: np.ndarray) -> ImageSource:
        taken = super().take(indices)
        taken.rows = np.asarray(indices) if self.rows is None else self.rows[indices]
        return taken

    def __getstate__(self) -> dict[str, Any]:
        own = self.own
        return {**vars(self), "dataset": None, "own": (str(own), own.flag)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.own = load_own(*state["own"])
        self.dataset = self.own.value(self.split)
