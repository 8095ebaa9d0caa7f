"""Small data sets kept completely in memory, on the host or the device, with views made a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from data.augment import Augmentation, draw_views
from data.batches import Batch, open_or_replace
from data.colour import apply_colour
from data.images import BadImage
from data.samplers import RandomSampler
from data.sources import ImageSource
from data.views import batched_crop
from runtime.device import free_memory, send
from runtime.errors import UserError


class ResidentLoader:
    """Training batches without worker processes. All images are decoded once; crops, flips and colour changes are
    batched operations on the device, with the same parameters from the same keys as in data.loader.

    Raises UserError if the images have different sizes or do not fit into memory.
    """

    def __init__(self, source: ImageSource, augmentations: Sequence[Augmentation], sampler: RandomSampler, seed: int,
                 device: torch.device, cache: str, threads: int = 0):
        self.augmentations, self.sampler, self.seed, self.device = tuple(augmentations), sampler, seed, device
        self.images, self.bad = decode_all(source, cache, device, threads)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        for keys in self.sampler:
            indices, stamps = np.array(keys, np.int64).reshape(-1, 2).T
            shown, bad = self._replaced(indices, stamps)
            views = self._views(shown, stamps) if shown is not None else ()
            yield Batch(views, torch.from_numpy(indices.copy()), bad)

    def repeats(self) -> str:
        """'': no image is opened during training."""
        return ""

    def advice(self) -> str:
        """'': the device makes the views itself, so there is nothing to tune."""
        return ""

    def _views(self, indices: np.ndarray, stamps: np.ndarray) -> tuple[torch.Tensor, ...]:
        rows = torch.from_numpy(indices)
        images = (send(self.images[rows], self.device) if self.images.device.type == "cpu" else
                  self.images[send(rows, self.device)])  # [b, 3, H, W]
        views = []
        for size, drawn in draw_views(self.augmentations, self.seed, stamps):
            view = batched_crop(images, drawn.boxes(*images.shape[-2:]), drawn.flip, size)
            views.append(apply_colour(view, torch.from_numpy(drawn.colour)))
        return tuple(views)

    def _replaced(self, indices: np.ndarray, stamps: np.ndarray) -> tuple[np.ndarray | None, list[tuple[int, str]]]:
        """The indices, in which unreadable images are replaced as in data.loader."""
        bad: list[tuple[int, str]] = []
        if not self.bad:
            return indices, bad

        def look(index: int) -> int:
            if index in self.bad:
                raise BadImage(self.bad[index])
            return index

        shown = []
        for index, stamp in zip(indices.tolist(), stamps.tolist(), strict=True):
            found, reasons = open_or_replace(look, index, stamp, self.seed, len(self.images))
            shown.append(found)
            bad += reasons
        return (None if None in shown else np.array(shown, np.int64)), bad


def decode_all(source: ImageSource, cache: str, device: torch.device, threads: int,
               ) -> tuple[torch.Tensor, dict[int, str]]:
    """All images as uint8 [N, 3, H, W], on the device or the host, and {index: reason} of unreadable images."""
    bad: dict[int, str] = {}

    def pixels(i: int) -> torch.Tensor | None:
        try:
            return source.pixels(i)
        except BadImage as error:
            bad[i] = str(error)
            return None

    images = None
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for start in range(0, len(source), 4096):  # in chunks, because decoded images wait in the map
            part = range(start, min(start + 4096, len(source)))
            for i, image in zip(part, pool.map(pixels, part), strict=True):
                if image is None:
                    continue
                if images is None:
                    first, shape = i, tuple(image.shape)
                    _check_room(len(source), shape, cache, device)
                    images = torch.zeros(len(source), *shape, dtype=torch.uint8)
                if tuple(image.shape) != shape:
                    raise UserError(
                        f"--cache {cache} needs images of one size, but {source.location(first)} has {shape[2]} x "
                        f"{shape[1]} pixels and {source.location(i)} has {image.shape[2]} x {image.shape[1]}; omit "
                        "--cache, or resize the images"
                    )
                images[i] = image
    if images is None:  # every image is unreadable, which the first batch reports
        images = torch.zeros(len(source), 3, 1, 1, dtype=torch.uint8)
    return images.to(device) if cache == "device" else images, bad


def _check_room(count: int, shape: tuple[int, ...], cache: str, device: torch.device) -> None:
    needed = count * int(np.prod(shape))
    room, where = free_memory(torch.device("cpu")), "the host's memory"
    if cache == "device" and device.type == "cuda":
        room, where = min(room, free_memory(device) // 2), "half of the GPU's memory (the rest is for training)"
    if needed > room:
        raise UserError(f"--cache {cache} needs {needed / 2**30:.1f} GiB for {count:,} images, more than the "
                        f"{room / 2**30:.1f} GiB free in {where}; omit --cache")
