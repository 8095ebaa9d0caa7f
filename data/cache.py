"""A cache of decoded images in shared memory."""

from __future__ import annotations

import multiprocessing

import numpy as np
import torch
from PIL import Image

from data.parcels import SHARED, room
from data.sources import ImageSource
from runtime.errors import UserError
from runtime.numbers import amount


def pooled(source: ImageSource, gigabytes: float, cache: str = "none") -> ImageSource:
    """``source`` with an image cache of so many ``gigabytes``, or itself for 0. Raises :class:`UserError` if --cache
    keeps all images anyway."""
    if gigabytes and cache != "none":
        raise UserError(f"--image-cache {gigabytes:g} has no effect with --cache {cache}, which keeps all images; "
                        "omit one of the two flags")
    return CachedSource(source, gigabytes) if gigabytes else source


class CachedSource(ImageSource):
    """A source that keeps decoded images of another source in shared memory, for all workers of this process.

    gigabytes: size of the pool, in 10^9 bytes. The pool fills with the images that are read first, and they stay: if
    each image is read once per epoch in random order, no replacement policy gets more hits.

    Works with forked and with spawned workers. `encoded` returns None, so that all reads go through `pixels`. Raises
    UserError, naming --image-cache, if the machine has too little shared memory.
    """

    def __init__(self, source: ImageSource, gigabytes: float):
        super().__init__(source.names, source.labels, source.classes, source.title)
        self.source, self.notes = source, source.notes
        self.rows: np.ndarray | None = None
        self._pool = _Pool(int(gigabytes * 1e9), len(source))

    def pixels(self, i: int) -> torch.Tensor:
        """Image i as uint8 [3, H, W], in channels-last memory that the caller may change."""
        row = range(len(self))[i] if self.rows is None else int(self.rows[i])
        found = self._pool.get(row)
        if found is None:
            found = self.source.pixels(row).permute(1, 2, 0).contiguous()
            self._pool.put(row, found)
        return found.permute(2, 0, 1)

    def open(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels(i).permute(1, 2, 0).numpy())

    def location(self, i: int) -> str:
        return self.source.location(i if self.rows is None else int(self.rows[i]))

    def take(self, indices: np.ndarray) -> CachedSource:
        """A source of only these images, which uses the same pool."""
        taken = super().take(indices)
        taken.rows = np.asarray(indices) if self.rows is None else self.rows[indices]
        return taken

    def hit_rate(self) -> float:
        """The fraction of reads, over all workers since the start, that the pool answered; 0 at first."""
        hits, misses = self._pool.counts[:2].tolist()
        return hits / max(1, hits + misses)

    def summary(self) -> str:
        """One line: how full the pool is, and its hit rate."""
        images, used = int((self._pool.places >= 0).sum()), int(self._pool.counts[2])
        return (f"image cache: {images:,} of {len(self._pool.places):,} images in {used / 1e9:.2f} of "
                f"{len(self._pool.memory) / 1e9:.2f} GB, hit rate {100 * self.hit_rate():.1f} %")

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        if self.rows is None:  # the wrapped source has the names; a packed one does not even pickle them
            state["names"] = None
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self.names is None:
            self.names = self.source.names


class _Pool:
    """Images in one block of shared memory. They are never removed, so readers need no lock while they copy."""

    def __init__(self, size: int, count: int):
        _check_room(size)
        # Allocated as in torch's own default_collate, because share_memory_() would fill a private block first.
        self.memory = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
        self.places = torch.full((count,), -1, dtype=torch.int64).share_memory_()  # first byte of image i
        self.shapes = torch.zeros(count, 2, dtype=torch.int64).share_memory_()  # height, width
        self.counts = torch.zeros(3, dtype=torch.int64).share_memory_()  # hits, misses, bytes used
        # A lock of the spawn context works for forked workers too, but not the other way round.
        self.lock = multiprocessing.get_context("spawn").Lock()

    def get(self, i: int) -> torch.Tensor | None:
        """A copy, uint8 [H, W, 3], or None."""
        with self.lock:
            place = int(self.places[i])
            self.counts[0 if place >= 0 else 1] += 1
        if place < 0:
            return None
        height, width = self.shapes[i].tolist()
        return self.memory[place : place + height * width * 3].clone().view(height, width, 3)

    def put(self, i: int, image: torch.Tensor) -> None:
        """Keep uint8 [H, W, 3] if there is room and no other worker has put the image here already."""
        with self.lock:
            start = int(self.counts[2])
            if self.places[i] >= 0 or start + image.numel() > len(self.memory):
                return
            self.counts[2] += image.numel()
        self.memory[start : start + image.numel()] = image.flatten()
        with self.lock:
            if self.places[i] < 0:  # else another worker has put it here meanwhile, and these bytes stay unused
                self.shapes[i] = torch.tensor(image.shape[:2])
                self.places[i] = start


def _check_room(size: int) -> None:
    """Check the size beforehand, because writing beyond the end of shared memory kills the process."""
    free, _ = room() or (size, 0)
    if size > free:
        raise UserError(f"--image-cache {amount(size)} does not fit into {SHARED}, where {amount(free)} are free; give "
                        "less, or start the container with more shared memory (--shm-size)")
