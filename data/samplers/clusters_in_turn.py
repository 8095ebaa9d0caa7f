"""Anchors taken from the clusters in turn, each with its neighbours."""

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
    """Anchors from the clusters in turn, each with its neighbours, until a share `coverage` of the images was seen.

    Each cluster, in a new random order each epoch, gives one anchor a round: its next image, in a random order of
    its own, that no earlier step has shown. So no anchor comes twice while unseen images remain. Only an epoch's
    last step may find fewer unseen images than anchors; it then takes them all and fills up with others.

    What a step holds depends on the steps before it, and the number of steps on the draws. The first step is
    composed at once; `len` and a start in the middle compose the epoch's anchors (indices, no images) beforehand.
    """

    about = "anchors from the clusters in turn, each with its neighbours, until most images were seen"
    tables = {"neighbours": NEAREST, "far": FARTHEST, "labels": CLUSTERS}

    def __init__(self, neighbours: np.ndarray, labels: np.ndarray, batch_size: int, nearest_k: NearestK = 15,
                 total_k: TotalK = 31, rank: int = 0, world_size: int = 1, seed: int = 0, far: np.ndarray | None = None,
                 coverage: Annotated[float, Setting(
                     "an epoch ends when this share of the images was seen; default {default}, the original's",
                     above=0, most=1, metavar="X")] = 0.95):
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
