"""Decoding less often: once for as long as a pool in shared memory holds the image."""

from __future__ import annotations

import multiprocessing

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data.parcels import SHARED, room
from data.sources import ImageSource
from runtime.errors import UserError
from runtime.numbers import amount


def pooled(source: ImageSource, gigabytes: float, cache: str = "none") -> ImageSource:
    """``source`` with a pool of --image-cache ``gigabytes``; itself for none. Raises :class:`UserError` where --cache
    keeps all images anyway."""
    if gigabytes and cache != "none":
        raise UserError(f"--image-cache {gigabytes:g} is of no use beside --cache {cache}, which keeps all images; "
                        "leave one of the two out")
    return CachedSource(source, gigabytes) if gigabytes else source


class CachedSource(ImageSource):
    """Another source whose decoded images are kept in shared memory, for all workers of this process.

    gigabytes: size of the pool, in 10^9 bytes. short_side: images are made smaller to this many pixels of their
    shorter side (antialiased bilinear) before they are kept; None keeps their pixels as they are. Images are the
    same whether they come from the pool or not. The pool fills with the images that are asked for first and then
    stays: in random order, each image being asked for once an epoch, no way of replacing them finds more.

    Works with workers by fork and by spawn. `encoded` gives None, so that all go through `pixels`. Raises
    UserError, naming --image-cache, where the machine's shared memory has no room for it.
    """

    def __init__(self, source: ImageSource, gigabytes: float, short_side: int | None = None):
        super().__init__(source.names, source.labels, source.classes, source.title)
        self.source, self.short_side, self.notes = source, short_side, source.notes
        self.rows: np.ndarray | None = None
        self._pool = _Pool(int(gigabytes * 1e9), len(source))

    def pixels(self, i: int) -> torch.Tensor:
        """Image i as uint8 [3, H, W], in channels-last memory that belongs to the caller."""
        row = range(len(self))[i] if self.rows is None else int(self.rows[i])
        found = self._pool.get(row)
        if found is None:
            found = self._limited(self.source.pixels(row)).permute(1, 2, 0).contiguous()
            self._pool.put(row, found)
        return found.permute(2, 0, 1)

    def open(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels(i).permute(1, 2, 0).numpy())

    def location(self, i: int) -> str:
        return self.source.location(i if self.rows is None else int(self.rows[i]))

    def take(self, indices: np.ndarray) -> CachedSource:
        """Some of the images, from the same pool."""
        taken = super().take(indices)
        taken.rows = np.asarray(indices) if self.rows is None else self.rows[indices]
        return taken

    def hit_rate(self) -> float:
        """Share of the images asked for, in all workers since the start, that were in the pool; 0 at first."""
        hits, misses = self._pool.counts[:2].tolist()
        return hits / max(1, hits + misses)

    def summary(self) -> str:
        """One line: how full the pool is, and the hit rate."""
        images, used = int((self._pool.places >= 0).sum()), int(self._pool.counts[2])
        return (f"image cache: {images:,} of {len(self._pool.places):,} images in {used / 1e9:.2f} of "
                f"{len(self._pool.memory) / 1e9:.2f} GB, hit rate {100 * self.hit_rate():.1f} %")

    def _limited(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[1:]
        if self.short_side is None or min(height, width) <= self.short_side:
            return image
        scale = self.short_side / min(height, width)
        size = [round(height * scale), round(width * scale)]
        return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        if self.rows is None:  # the wrapped source has them; a packed one even without sending them
            state["names"] = None
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self.names is None:
            self.names = self.source.names


class _Pool:
    """Images in one block of shared memory; once in it they stay, so that readers need no lock while they copy."""

    def __init__(self, size: int, count: int):
        _check_room(size)
        # What torch's own default_collate allocates with: share_memory_() would fill a private block first.
        self.memory = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
        self.places = torch.full((count,), -1, dtype=torch.int64).share_memory_()  # first byte of image i
        self.shapes = torch.zeros(count, 2, dtype=torch.int64).share_memory_()  # height, width
        self.counts = torch.zeros(3, dtype=torch.int64).share_memory_()  # hits, misses, bytes used
        # A lock of the spawn kind can be inherited too; one of the fork kind cannot be sent to spawned workers.
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
        """Keep uint8 [H, W, 3] if there is room and no other worker was first."""
        with self.lock:
            start = int(self.counts[2])
            if self.places[i] >= 0 or start + image.numel() > len(self.memory):
                return
            self.counts[2] += image.numel()
        self.memory[start : start + image.numel()] = image.flatten()
        with self.lock:
            if self.places[i] < 0:  # else another put it there meanwhile, and these bytes stay unused
                self.shapes[i] = torch.tensor(image.shape[:2])
                self.places[i] = start


def _check_room(size: int) -> None:
    """Writing to shared memory that is not there kills the process that does it, so this is asked before."""
    free, _ = room() or (size, 0)
    if size > free:
        raise UserError(f"--image-cache {amount(size)} does not fit into {SHARED}, where {amount(free)} are free; give "
                        "less, or (in a container) start it with more shared memory (--shm-size)")
