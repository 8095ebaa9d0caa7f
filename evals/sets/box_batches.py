"""Batches of images with boxes, each image in its own size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.batches import as_key
from data.images import BadImage, decode_rgb, read_bytes
from data.loader import WorkerLoader, loader_options
from data.samplers import Key, RandomSampler
from evals.sets.boxes import BoxSource
from runtime.errors import UserError


class BoxBatch(NamedTuple):
    """One step's images: ``views`` uint8 [3, H, W] each; ``indices`` int64 [B]; ``bad``: (file, reason) of those that
    could not be opened; ``targets``: ``boxes`` float32 [n, 4] and ``labels`` int64 [n] from 1, 0 being the background.
    """

    views: tuple[Tensor, ...]
    indices: Tensor
    bad: list[tuple[str, str]]
    targets: list[dict[str, Tensor]]


class BoxDataset(Dataset):
    """Whole batches of the images ``rows``, int64 [N], that keys count from 0; with a ``seed`` half of them are
    mirrored, drawn from (seed, stamp).

    Nothing is raised here: what a worker raises reaches the user as a traceback in a traceback.
    """

    def __init__(self, source: BoxSource, rows: np.ndarray, seed: int | None = None) -> None:
        self.source, self.rows, self.seed = source, rows, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: Sequence[Key | int]) -> BoxBatch:
        views, bad, targets = [], [], []
        pairs = [(int(self.rows[number]), stamp) for number, stamp in map(as_key, keys)]
        for index, stamp in pairs:
            rows = self.source.trained(index)
            boxes = torch.from_numpy(self.source.boxes[rows])
            try:
                image = self._open(index)
            except BadImage as error:
                bad.append((self.source.location(index), str(error)))
                continue
            if self.seed is not None and np.random.default_rng((self.seed, stamp)).random() < 0.5:
                image, width = image.flip(2), image.shape[2]
                boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
            views.append(image.contiguous())
            targets.append({"boxes": boxes, "labels": torch.from_numpy(self.source.labels[rows]) + 1})
        return BoxBatch(tuple(views), torch.tensor([index for index, _ in pairs]), bad, targets)

    def _open(self, index: int) -> Tensor:
        image = decode_rgb(read_bytes(self.source.location(index)))
        found, expected = list(image.shape[1:]), self.source.sizes[index].tolist()
        if found != expected:
            raise BadImage(f"it has {found[1]} x {found[0]} pixels, its boxes are for {expected[1]} x {expected[0]}")
        return image


def check_boxes(batch: BoxBatch) -> None:
    """Check a batch before using it. Raises UserError with the file and the reason."""
    for file, reason in batch.bad:
        raise UserError(f"{file} could not be used ({reason}); replace the file, or take it out of the annotations",
                        every_process=False)


def training_batches(source: BoxSource, rows: np.ndarray, sampler: RandomSampler, workers: int, seed: int,
                     device_type: str) -> DataLoader:
    """One batch a step of the sampler, which counts the images of ``rows``."""
    return WorkerLoader(BoxDataset(source, rows, seed), batch_sampler=sampler,
                        **loader_options(workers, device_type, persistent=True))


def evaluation_batches(source: BoxSource, rows: range, batch_size: int, workers: int, device_type: str) -> DataLoader:
    """The images of ``rows`` in their order."""
    return WorkerLoader(BoxDataset(source, np.array(rows, np.int64)), batch_size=batch_size,
                        **loader_options(workers, device_type, persistent=False))
