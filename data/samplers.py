"""Batch samplers: which images make up each step on each rank. Index arithmetic only.

A batch is a list of keys (index, stamp). The stamp, epoch * 2**40 + position of the image in the epoch's
global sequence, is unique over a run and does not depend on the number of ranks; the loader derives an
image's augmentation from it. Every draw depends on (seed, epoch, step) alone, so that a step holds the same
images on one rank or on eight, and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from runtime.errors import UserError

STAMPS_PER_EPOCH = 2**40  # far above the images of any epoch, and leaves 2**23 epochs in an int64

Key = tuple[int, int]


class RandomSampler(Sampler[list[Key]]):
    """Each image once an epoch, in a new order each epoch.

    batch_size counts anchors over all ranks: step s takes permutation[s * b : (s + 1) * b], and rank r the
    r-th of its world_size equal parts. The N % b left over fit no whole step and wait for another epoch. An
    anchor brings a group of images, here only itself. Raises UserError where the sizes do not fit together.
    """

    def __init__(self, num_images: int, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0):
        if batch_size < 1:
            raise UserError(f"--batch-size {batch_size} is not a number of images; give 1 or more")
        if batch_size % world_size:
            below, above = batch_size // world_size * world_size, -(-batch_size // world_size) * world_size
            advice = f"{below} or {above}" if below else f"{above}"
            raise UserError(f"--batch-size {batch_size} does not divide among {world_size} processes; give {advice}")
        if num_images < batch_size:
            raise UserError(
                f"--batch-size {batch_size} is more than the {num_images} images of --data; "
                "give a smaller batch or more images"
            )
        if seed < 0:
            raise UserError(f"--seed {seed} is negative; give 0 or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} processes")
        self.num_images, self.batch_size = num_images, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.group_size = 1  # images that an anchor brings, itself included
        self.steps_per_epoch = num_images // batch_size
        self.epoch = self.first_step = 0

    @property
    def images_per_step(self) -> int:
        """Images of one step on this rank."""
        return self.global_images_per_step // self.world_size

    @property
    def global_images_per_step(self) -> int:
        """Images of one step over all ranks."""
        return self.batch_size * self.group_size

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """The next iteration yields this epoch, from first_step on (a resumed run has done those before)."""
        if not 0 <= first_step <= self.steps_per_epoch:
            raise ValueError(f"step {first_step} is outside an epoch of {self.steps_per_epoch} steps")
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        """Steps left in the epoch."""
        return self.steps_per_epoch - self.first_step

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self.epoch  # a loader keeps drawing ahead while the caller may already set the next epoch
        permutation = self._generator(epoch, 0).permutation(self.num_images)
        mine = slice(self.rank * self.images_per_step, (self.rank + 1) * self.images_per_step)
        for step in range(self.first_step, self.steps_per_epoch):
            anchors = permutation[step * self.batch_size : (step + 1) * self.batch_size]
            indices = self._groups(anchors, self._generator(epoch, step + 1)).reshape(-1)
            first_stamp = epoch * STAMPS_PER_EPOCH + step * self.global_images_per_step
            stamps = range(first_stamp, first_stamp + len(indices))
            yield list(zip(indices[mine].tolist(), stamps[mine], strict=True))

    def _groups(self, anchors: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Anchors int64 [b] -> indices int64 [b, group_size], the anchor first."""
        return anchors[:, None]

    def _generator(self, epoch: int, stream: int) -> np.random.Generator:
        # Stream 0 is the permutation, s + 1 the draws of step s. Always three numbers: to SeedSequence (1, 2)
        # and (1, 2, 0) are the same.
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, epoch, stream))))


class NeighbourSampler(RandomSampler):
    """The paper's `cf`: each anchor is followed by nearest_k of its total_k nearest images.

    neighbours: integer [N, >= total_k], nearest first; a memory map will do, only the drawn entries are read.
    The draw is uniform and without replacement; where nearest_k equals total_k it is the nearest, in order.
    With nearest_k 0 this is RandomSampler. An image can occur twice in a step, as it can in the paper.
    """

    def __init__(
        self,
        neighbours: np.ndarray,
        batch_size: int,
        nearest_k: int,
        total_k: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ):
        super().__init__(len(neighbours), batch_size, rank, world_size, seed)
        if nearest_k < 0:
            raise UserError(f"--nearest-k {nearest_k} is negative; give 0 (no neighbours) or more")
        if nearest_k > total_k:
            raise UserError(
                f"--nearest-k {nearest_k} is more than --total-k {total_k}, from which they are drawn; "
                "lower the first or raise the second"
            )
        if neighbours.shape[1] < total_k:
            raise UserError(
                f"--total-k {total_k} is more than the {neighbours.shape[1]} neighbours an image that "
                "--closek-info holds; lower it, or mine more with compute_knn.py"
            )
        self.neighbours, self.nearest_k, self.total_k = neighbours, nearest_k, total_k
        self.group_size = 1 + nearest_k

    def _groups(self, anchors: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        if self.nearest_k in (0, self.total_k):
            columns = np.broadcast_to(np.arange(self.nearest_k), (len(anchors), self.nearest_k))
        else:  # the places of the k smallest of total_k random numbers are a uniform draw without replacement
            order = generator.random((len(anchors), self.total_k)).argpartition(self.nearest_k, axis=1)
            columns = order[:, : self.nearest_k]
        drawn = self.neighbours[anchors[:, None], columns]
        return np.concatenate([anchors[:, None], drawn.astype(np.int64)], axis=1)
