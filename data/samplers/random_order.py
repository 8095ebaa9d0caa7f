"""The sampler that takes each image once per epoch, which is the base of all others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from data.samplers.image_tables import ImageTable
from runtime.errors import UserError
from runtime.settings import declared

STAMPS_PER_EPOCH = 2**40  # far more than the images of any epoch, and an int64 has room for 2**23 epochs

Key = tuple[int, int]


class Statistics(NamedTuple):
    """Which images the steps of an epoch have shown, over all ranks."""

    images: int  # images shown, including repeats
    unique: int  # different images among them
    total: int  # images of the data set

    @property
    def repeats(self) -> int:
        return self.images - self.unique

    @property
    def share_seen(self) -> float:
        return self.unique / self.total

    def scalars(self) -> dict[str, float]:
        """The numbers to log, by name."""
        return {"images": self.images, "unique": self.unique, "repeats": self.repeats, "share_seen": self.share_seen}

    def __str__(self) -> str:
        return (f"{self.images:,} images shown, {self.unique:,} of {self.total:,} different ones "
                f"({100 * self.share_seen:.2f} %), {self.repeats:,} repeats")


class RandomSampler(Sampler[list[Key]]):
    """Each image once per epoch, in a new order every epoch.

    batch_size counts anchors over all ranks: step s takes permutation[s * b : (s + 1) * b], and rank r the
    r-th of its world_size equal parts. The remaining N % b images fill no step and are skipped in this epoch. An
    anchor stands for a group of images, which here is only itself. Raises UserError if the sizes do not fit together.
    """

    about = "each image once per epoch, no file"  # in the help of --sampler
    tables: Mapping[str, ImageTable] = {}  # the files that it reads, by argument of the constructor
    uneven_steps = ""  # why its steps differ in size, and what to do if they must not
    remark = ""  # a line for the log
    # The sampler that is used instead if only the files of that one are given, and `where`, its words for that case.
    stand_in: type[RandomSampler] | None = None
    where = ""
    table_fingerprints: Mapping[str, str] = {}  # hashes of what it reads of its files, by the names of their settings
    far_k = num_clusters = 0  # number of farthest images per anchor, number of clusters that steps are made from

    def __init__(self, num_images: int, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0):
        if batch_size < 1:
            raise UserError(f"--batch-size {batch_size} is less than 1; give 1 or more")
        if batch_size % world_size:
            below, above = batch_size // world_size * world_size, -(-batch_size // world_size) * world_size
            advice = f"{below} or {above}" if below else f"{above}"
            raise UserError(f"--batch-size {batch_size} cannot be divided evenly among {world_size} processes; give "
                            f"{advice}")
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
        self.group_size = 1  # images per anchor, including itself
        self.epoch = self.first_step = 0
        self.statistics: Statistics | None = None  # of the last epoch that was completed

    @classmethod
    def takes(cls, name: str) -> bool:
        """Whether ``name`` is one of its settings, or the name of one of its files."""
        return name in declared(cls) or name in {table.name for table in cls.tables.values()}

    @classmethod
    def check(cls, **settings: Any) -> None:
        """Raise :class:`UserError` if its settings do not fit together; called before any file is read."""

    @property
    def images_per_step(self) -> int:
        """Images of one step on this rank."""
        return self.global_images_per_step // self.world_size

    @property
    def global_images_per_step(self) -> int:
        """Images of one step over all ranks."""
        return self.batch_size * self.group_size

    def steps_in(self, epoch: int) -> int:
        """Steps of a whole epoch, the same on every rank."""
        return self.num_images // self.batch_size

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Make the next iteration yield this epoch, from first_step on; a resumed run has done the steps before."""
        if first_step and not 0 <= first_step <= self.steps_in(epoch):
            raise UserError(f"--resume: the run stopped after step {first_step} of epoch {epoch + 1}, which now has "
                            f"only {self.steps_in(epoch)} steps; give the same --batch-size and --data as before, or "
                            "start at the beginning of an epoch with --start-epoch")
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        """The number of steps from first_step to the end of the epoch."""
        return self.steps_in(self.epoch) - self.first_step

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, first_step = self.epoch, self.first_step  # a loader may still iterate when the next epoch is set
        mine = slice(self.rank * self.images_per_step, (self.rank + 1) * self.images_per_step)
        seen, shown = np.zeros(self.num_images, dtype=bool), 0
        for step, groups in enumerate(self._steps(epoch, first_step), first_step):
            indices = groups.reshape(-1)
            seen[indices] = True
            shown += len(indices)
            first_stamp = epoch * STAMPS_PER_EPOCH + step * self.global_images_per_step
            stamps = range(first_stamp, first_stamp + len(indices))
            yield list(zip(indices[mine].tolist(), stamps[mine], strict=True))
        for groups in islice(self._steps(epoch, 0), first_step):  # the steps that were done before a resume
            indices = groups.reshape(-1)
            seen[indices] = True
            shown += len(indices)
        self.statistics = Statistics(shown, int(np.count_nonzero(seen)), self.num_images)

    def _steps(self, epoch: int, first_step: int) -> Iterator[np.ndarray]:
        """The images int64 [b, group_size] of each step from first_step on, over all ranks."""
        order = self._order(epoch)
        for step in range(first_step, len(order) // self.batch_size):
            anchors = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield self._groups(anchors, self._generator(epoch, step + 1))

    def _order(self, epoch: int) -> np.ndarray:
        """All anchors of the epoch in the order of its steps, int64."""
        return self._generator(epoch, 0).permutation(self.num_images)

    def _groups(self, anchors: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Anchors int64 [b] -> indices int64 [b, group_size], the anchor first."""
        return anchors[:, None]

    def _generator(self, epoch: int, stream: int) -> np.random.Generator:
        # Stream 0 draws the permutation, stream s + 1 the neighbours of step s. There are always three numbers, because
        # SeedSequence does not distinguish (1, 2) from (1, 2, 0).
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, epoch, stream))))
