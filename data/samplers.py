"""Batch samplers: which images make up each step on each rank. Index arithmetic only.

A batch is a list of keys (index, stamp). The stamp, epoch * 2**40 + position of the image in the epoch's
global sequence, is unique over a run and does not depend on the number of ranks; the loader derives an
image's augmentation from it. Every draw depends on (seed, epoch, step) alone, so that a step holds the same
images on one rank or on eight, and after a resume. Every rank composes the whole step and takes its part, so
that ranks never overlap, have equally many steps, and all know what the epoch has shown.

    random      each image once                              RandomSampler
    cf          anchors with neighbours, the paper's         NeighbourSampler
    cluster     batches out of one k-means cluster each      ClusterSampler
    cluster+cf  anchors taken from the clusters in turn      ClusterNeighbourSampler
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from data.neighbours import row_reader
from runtime.errors import UserError

STAMPS_PER_EPOCH = 2**40  # far above the images of any epoch, and leaves 2**23 epochs in an int64

Key = tuple[int, int]
Reader = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Statistics(NamedTuple):
    """What the steps of an epoch have shown, over all ranks."""

    images: int  # shown, repeats included
    unique: int  # different ones among them
    total: int  # of the data set

    @property
    def repeats(self) -> int:
        return self.images - self.unique

    @property
    def share_seen(self) -> float:
        return self.unique / self.total

    def scalars(self) -> dict[str, float]:
        """To be logged."""
        return {"images": self.images, "unique": self.unique, "repeats": self.repeats, "share_seen": self.share_seen}

    def __str__(self) -> str:
        return (f"{self.images:,} images shown, {self.unique:,} of {self.total:,} different ones "
                f"({100 * self.share_seen:.2f} %), {self.repeats:,} repeats")


class RandomSampler(Sampler[list[Key]]):
    """Each image once an epoch, in a new order each epoch.

    batch_size counts anchors over all ranks: step s takes permutation[s * b : (s + 1) * b], and rank r the
    r-th of its world_size equal parts. The N % b left over fit no whole step and wait for another epoch. An
    anchor brings a group of images, here only itself. Raises UserError where the sizes do not fit together.
    """

    far_k = num_clusters = 0  # farthest images that an anchor brings, clusters that steps are made from

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
        self.epoch = self.first_step = 0
        self.statistics: Statistics | None = None  # of the last epoch that was gone through

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
        """The next iteration yields this epoch, from first_step on (a resumed run has done those before)."""
        if first_step and not 0 <= first_step <= self.steps_in(epoch):
            raise UserError(f"--resume: the run stopped after step {first_step} of epoch {epoch}, which now has "
                            f"{self.steps_in(epoch)} steps; give --batch-size and --data of before, or begin an epoch "
                            "by --start-epoch")
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        """Steps left in the epoch."""
        return self.steps_in(self.epoch) - self.first_step

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, first_step = self.epoch, self.first_step  # a loader may still draw while the next epoch is set
        mine = slice(self.rank * self.images_per_step, (self.rank + 1) * self.images_per_step)
        seen, shown = np.zeros(self.num_images, dtype=bool), 0
        for step, groups in enumerate(self._steps(epoch, first_step), first_step):
            indices = groups.reshape(-1)
            seen[indices] = True
            shown += len(indices)
            first_stamp = epoch * STAMPS_PER_EPOCH + step * self.global_images_per_step
            stamps = range(first_stamp, first_stamp + len(indices))
            yield list(zip(indices[mine].tolist(), stamps[mine], strict=True))
        for groups in islice(self._steps(epoch, 0), first_step):  # those that were done before a resume
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
        """All anchors of the epoch, int64, step after step."""
        return self._generator(epoch, 0).permutation(self.num_images)

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
    far, a table like it, farthest first: half of the nearest_k (rounded down) come from its first total_k, drawn
    in the same way, after the near half. With nearest_k 0 this is RandomSampler. An image can occur twice in a
    step, as it can in the paper.
    """

    def __init__(self, neighbours: np.ndarray, batch_size: int, nearest_k: int, total_k: int, rank: int = 0,
                 world_size: int = 1, seed: int = 0, far: np.ndarray | None = None):
        super().__init__(len(neighbours), batch_size, rank, world_size, seed)
        if nearest_k < 0:
            raise UserError(f"--nearest-k {nearest_k} is negative; give 0 (no neighbours) or more")
        if nearest_k > total_k:
            raise UserError(
                f"--nearest-k {nearest_k} is more than --total-k {total_k}, from which they are drawn; "
                "lower the first or raise the second"
            )
        for table, flag in ((neighbours, "--closek-info"), (far, "--fark-info")):
            if table is not None and table.shape[1] < total_k:
                raise UserError(
                    f"--total-k {total_k} is more than the {table.shape[1]} neighbours an image that "
                    f"{flag} holds; lower it, or mine more with compute_knn.py"
                )
        if far is not None and len(far) != len(neighbours):
            raise UserError(f"--fark-info holds {len(far):,} images and --closek-info {len(neighbours):,}; give two "
                            "files that compute_knn.py mine wrote together")
        self.nearest_k, self.total_k = nearest_k, total_k
        self.read_near, self.read_far = row_reader(neighbours), None if far is None else row_reader(far)
        self.far_k = 0 if far is None else nearest_k // 2
        self.group_size = 1 + nearest_k

    def _groups(self, anchors: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        parts = [anchors[:, None], self._draw(self.read_near, anchors, self.nearest_k - self.far_k, generator)]
        if self.far_k:
            parts.append(self._draw(self.read_far, anchors, self.far_k, generator))
        return np.concatenate(parts, axis=1)

    def _draw(self, read: Reader, anchors: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
        """count of the first total_k entries of each anchor's row, int64 [b, count]."""
        if count == 0 or self.nearest_k == self.total_k:
            columns = np.broadcast_to(np.arange(count), (len(anchors), count))
        else:  # the places of the smallest of total_k random numbers are a uniform draw without replacement
            columns = generator.random((len(anchors), self.total_k)).argpartition(count, axis=1)[:, :count]
        return read(anchors, columns)


def shuffled_clusters(labels: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """All images cluster by cluster, int64 [N], and the clusters' sizes, int64 [K], both in the same new order.

    The order of the clusters and that of the images in each is random. labels: integers [N] in [0, K).
    """
    sizes = np.bincount(labels)
    place = generator.permutation(len(sizes))
    order = generator.permutation(len(labels))
    keys = place.astype(np.uint16 if len(sizes) <= 2**16 else np.uint32)[labels[order]]  # 16 bits: numpy's radix sort
    moved = np.empty_like(sizes)
    moved[place] = sizes
    return order[np.argsort(keys, kind="stable")], moved


class ClusterSampler(RandomSampler):
    """Each image once an epoch, and each step out of one k-means cluster.

    labels: the cluster of each image, integers [N] from 0 on. A cluster of n images gives n // b whole steps; what
    is left of the clusters is put together, cluster after cluster, into mixed steps, so that small clusters count
    too. Steps come in random order. The N % b images that fit no step are other ones each epoch.
    """

    def __init__(self, labels: np.ndarray, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0):
        super().__init__(len(labels), batch_size, rank, world_size, seed)
        self.labels, self.num_clusters = labels, int(labels.max()) + 1

    def _order(self, epoch: int) -> np.ndarray:
        generator = self._generator(epoch, 0)
        images, sizes = shuffled_clusters(self.labels, generator)
        starts = np.cumsum(sizes) - sizes
        whole = sizes // self.batch_size * self.batch_size
        is_whole = np.arange(len(images)) < np.repeat(starts + whole, sizes)  # the first so many of each cluster
        images = np.concatenate([images[is_whole], images[~is_whole]])
        steps = images[: self.steps_in(epoch) * self.batch_size].reshape(-1, self.batch_size)
        return steps[generator.permutation(len(steps))].reshape(-1)


class ClusterNeighbourSampler(NeighbourSampler):
    """Anchors from the clusters in turn, each with its neighbours, until a share `coverage` of the images was seen.

    Each cluster, in a new random order each epoch, gives one anchor a round: its next image, in a random order of
    its own, that no earlier step has shown. So no anchor comes twice while unseen images remain. Only an epoch's
    last step may find fewer unseen images than anchors; it then takes them all and fills up with others.

    What a step holds depends on the steps before it, and the number of steps on the draws. The first step is
    composed at once; `len` and a start in the middle compose the epoch's anchors (indices, no images) beforehand.
    """

    def __init__(self, neighbours: np.ndarray, labels: np.ndarray, batch_size: int, nearest_k: int, total_k: int,
                 rank: int = 0, world_size: int = 1, seed: int = 0, far: np.ndarray | None = None,
                 coverage: float = 0.95):
        super().__init__(neighbours, batch_size, nearest_k, total_k, rank, world_size, seed, far)
        if len(labels) != len(neighbours):
            raise UserError(f"--cluster-info holds {len(labels):,} images and --closek-info {len(neighbours):,}; give "
                            "two files of the same data")
        if not 0 < coverage <= 1:
            raise UserError(f"--coverage {coverage:g} is not a share of the images; give a number above 0, up to 1")
        self.labels, self.num_clusters, self.coverage = labels, int(labels.max()) + 1, coverage
        self._plan: tuple[int, np.ndarray] | None = None  # the last epoch whose anchors were all composed

    def steps_in(self, epoch: int) -> int:
        return len(self._order(epoch)) // self.batch_size

    def _order(self, epoch: int) -> np.ndarray:
        if self._plan is None or self._plan[0] != epoch:
            self._plan = epoch, np.concatenate([groups[:, 0] for groups in self._compose(epoch)])
        return self._plan[1]

    def _steps(self, epoch: int, first_step: int) -> Iterator[np.ndarray]:
        planned = self._plan is not None and self._plan[0] == epoch
        return super()._steps(epoch, first_step) if planned or first_step else self._compose(epoch)

    def _compose(self, epoch: int) -> Iterator[np.ndarray]:
        turns = _Turns(*shuffled_clusters(self.labels, self._generator(epoch, 0)))
        seen, count, step = np.zeros(self.num_images, dtype=bool), 0, 0
        wanted = math.ceil(self.coverage * self.num_images - 1e-9)  # 0.95 * 20 must not become 20
        while count < wanted:
            step += 1
            groups = self._groups(turns.take(self.batch_size, seen), self._generator(epoch, step))
            yield groups
            count += len(np.unique(groups[~seen[groups]]))
            seen[groups] = True


class _Turns:
    """Whose turn it is: images cluster by cluster, and how far each cluster has come."""

    WINDOW = np.arange(8)  # images of a cluster that are looked at together

    def __init__(self, images: np.ndarray, sizes: np.ndarray):
        self.images, self.ends = images, np.cumsum(sizes)
        self.next = self.ends - sizes
        self.was_anchor = np.zeros(len(images), dtype=bool)
        self.ring, self.turn = np.flatnonzero(sizes), 0  # clusters that may have more to give

    def take(self, count: int, seen: np.ndarray) -> np.ndarray:
        """count different images, int64: the next unseen one of each cluster in turn. Where no unseen image is left
        anywhere, others follow: first those that were no anchor yet."""
        taken = np.empty(0, dtype=np.int64)
        while len(taken) < count and len(self.ring):
            clusters = self.ring[self.turn : self.turn + count - len(taken)]
            at = self._next_unseen(clusters, seen)
            taken = np.concatenate([taken, self.images[at[at < self.ends[clusters]]]])
            self.next[clusters] = at + 1
            self.turn += len(clusters)
            if self.turn >= len(self.ring):
                self.ring, self.turn = self.ring[self.next[self.ring] < self.ends[self.ring]], 0
        self.was_anchor[taken] = True
        if len(taken) < count:
            others = self.images[~np.isin(self.images, taken)]
            others = others[np.argsort(self.was_anchor[others], kind="stable")]
            taken = np.concatenate([taken, others[: count - len(taken)]])
        return taken

    def _next_unseen(self, clusters: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Place in `images` of each cluster's next unseen image, or its end."""
        at, ends = self.next[clusters], self.ends[clusters]
        looking = np.arange(len(clusters))
        while len(looking):
            places = at[looking, None] + self.WINDOW
            stops = places >= ends[looking, None]
            stops |= ~seen[self.images[np.minimum(places, len(self.images) - 1)]]
            found = stops.any(axis=1)
            at[looking] += np.where(found, stops.argmax(axis=1), len(self.WINDOW))
            looking = looking[~found]
        return at
