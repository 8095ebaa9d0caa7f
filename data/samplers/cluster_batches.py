"""Batches in which all images come from one k-means cluster."""

from __future__ import annotations

import numpy as np

from data.samplers.image_tables import CLUSTERS
from data.samplers.random_order import RandomSampler
from data.samplers.whole_clusters import WholeClusterSampler


def shuffled_clusters(labels: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """All images cluster by cluster, int64 [N], and the sizes of the clusters in that order, int64 [K].

    Both the order of the clusters and the order of the images within each are random. labels: integers [N] in [0, K).
    """
    sizes = np.bincount(labels)
    place = generator.permutation(len(sizes))
    order = generator.permutation(len(labels))
    keys = place.astype(np.uint16 if len(sizes) <= 2**16 else np.uint32)[labels[order]]  # 16 bits get a radix sort
    moved = np.empty_like(sizes)
    moved[place] = sizes
    return order[np.argsort(keys, kind="stable")], moved


class ClusterSampler(RandomSampler):
    """Each image once per epoch, and the images of each step from one k-means cluster.

    labels: the cluster of each image, integers [N] from 0 on. A cluster of n images gives n // b complete steps; the
    remaining images of all clusters are joined, cluster after cluster, into mixed steps, so that small clusters are
    used too. Steps come in random order. The N % b images that fill no step differ from epoch to epoch.
    """

    about = "each image once, the images of each step from one k-means cluster of --cluster-info"
    tables = {"labels": CLUSTERS}
    stand_in = WholeClusterSampler

    def __init__(self, labels: np.ndarray, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0):
        super().__init__(len(labels), batch_size, rank, world_size, seed)
        self.labels, self.num_clusters = labels, int(labels.max()) + 1

    def _order(self, epoch: int) -> np.ndarray:
        generator = self._generator(epoch, 0)
        images, sizes = shuffled_clusters(self.labels, generator)
        starts = np.cumsum(sizes) - sizes
        whole = sizes // self.batch_size * self.batch_size
        is_whole = np.arange(len(images)) < np.repeat(starts + whole, sizes)  # the first whole[c] of each cluster c
        images = np.concatenate([images[is_whole], images[~is_whole]])
        steps = images[: self.steps_in(epoch) * self.batch_size].reshape(-1, self.batch_size)
        return steps[generator.permutation(len(steps))].reshape(-1)
