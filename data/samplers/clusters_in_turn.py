"""Anchors from the clusters in turn, each with its neighbours."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

import numpy as np

from data.samplers.cluster_batches import shuffled_clusters
from data.samplers.image_tables import CLUSTERS, FARTHEST, NEAREST
from data.samplers.neighbour_batches import NearestK, NeighbourSampler, TotalK
from runtime.errors import UserError
from runtime.settings import Setting


class ClusterNeighbourSampler(NeighbourSampler):
    """Anchors from the clusters in turn, each with its neighbours, until the epoch has shown a fraction `coverage` of
    all images.

    In each round every cluster gives one anchor: its next image, in random order, that no earlier step has shown. The
    order of the clusters is random too and changes every epoch. So no image is an anchor twice while unseen images
    remain. Only the last step of an epoch may find fewer unseen images than it needs anchors; it takes all of them and
    then other images.

    The content of a step depends on the steps before it, and the number of steps on the random numbers. The first step
    is composed immediately; `len`, and a start in the middle of an epoch, first compute the anchors of the whole epoch.
    """

    about = "anchors from the clusters in turn, each with its neighbours, until most images were seen"
    tables = {"neighbours": NEAREST, "far": FARTHEST, "labels": CLUSTERS}

    def __init__(self, neighbours: np.ndarray, labels: np.ndarray, batch_size: int, nearest_k: NearestK = 15,
                 total_k: TotalK = 31, rank: int = 0, world_size: int = 1, seed: int = 0, far: np.ndarray | None = None,
                 coverage: Annotated[float, Setting(
                     "fraction of the images that must have been seen before an epoch ends; default {default}, as in "
                     "the original",
                     above=0, most=1, metavar="X")] = 0.95):
        super().__init__(neighbours, batch_size, nearest_k, total_k, rank, world_size, seed, far)
        if len(labels) != len(neighbours):
            raise UserError(f"--cluster-info holds {len(labels):,} images and --closek-info {len(neighbours):,}; give "
                            "two files of the same data")
        if not 0 < coverage <= 1:
            raise UserError(f"--coverage {coverage:g} is not a fraction; give a number above 0 and at most 1")
        self.labels, self.num_clusters, self.coverage = labels, int(labels.max()) + 1, coverage
        self._plan: tuple[int, np.ndarray] | None = None  # the last epoch whose anchors were all computed, and these

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
    """Takes images from the clusters in turn, and remembers the position in each cluster."""

    WINDOW = np.arange(8)  # images of a cluster that are checked at once

    def __init__(self, images: np.ndarray, sizes: np.ndarray):
        self.images, self.ends = images, np.cumsum(sizes)
        self.next = self.ends - sizes
        self.was_anchor = np.zeros(len(images), dtype=bool)
        self.ring, self.turn = np.flatnonzero(sizes), 0  # clusters that may have unseen images, and whose turn it is

    def take(self, count: int, seen: np.ndarray) -> np.ndarray:
        """``count`` different images, int64: the next unseen image of each cluster in turn. If no unseen image is left,
        other images follow, first those that have not been anchors."""
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
        """The position in `images` of the next unseen image of each cluster, or the end of the cluster."""
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
