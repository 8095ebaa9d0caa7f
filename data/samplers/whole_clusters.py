"""The original's `cluster` sampler: each step of a rank is one whole k-means cluster, whatever its size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from data.samplers.image_tables import CLUSTERS_AS_NEAREST
from data.samplers.random_order import STAMPS_PER_EPOCH, Key, RandomSampler, Statistics
from runtime.errors import UserError


class WholeClusterSampler(RandomSampler):
    """Clusters in a new random order every epoch; rank r takes the r-th of every world_size clusters.

    labels: the cluster of each image, integers [N] from 0 on; empty clusters are skipped. The remaining K % world_size
    clusters are skipped in this epoch (in the original, ranks then have different numbers of steps, and hang). The
    order is torch.randperm's with seed + epoch, which for seed 0 is the original's.
    """

    about = ("if --closek-info is a cluster file instead, each step of a process is a whole cluster, as in the "
             "original")
    tables = {"labels": CLUSTERS_AS_NEAREST}
    where = "if it holds the clusters"
    remark = "each step of a process is a whole cluster of --closek-info; -b is not used"
    uneven_steps = ("with clusters in --closek-info, --sampler cluster makes each step a whole cluster; give the file "
                    "as --cluster-info instead, and steps have -b images")

    def __init__(self, labels: np.ndarray, rank: int = 0, world_size: int = 1, seed: int = 0):
        sizes = np.bincount(labels)
        members = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
        self.clusters = [images for images in members if len(images)]
        if len(self.clusters) < world_size:
            raise UserError(f"--closek-info has {len(self.clusters)} clusters, fewer than the {world_size} processes, "
                            "each of which takes one; start fewer processes, or make more clusters with compute_knn.py "
                            "cluster")
        super().__init__(len(labels), world_size, rank, world_size, seed)
        self.num_clusters = len(sizes)

    @property
    def images_per_step(self) -> int:
        """The size of the smallest cluster, which is the smallest step of a rank."""
        return min(map(len, self.clusters))

    @property
    def global_images_per_step(self) -> int:
        """The average number of images of one step over all ranks."""
        return round(self.num_images / len(self.clusters) * self.world_size)

    def steps_in(self, epoch: int) -> int:
        return len(self.clusters) // self.world_size

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, first_step = self.epoch, self.first_step
        order = torch.randperm(len(self.clusters), generator=torch.Generator().manual_seed(self.seed + epoch)).numpy()
        order = order[:self.steps_in(epoch) * self.world_size]
        sizes = np.array([len(self.clusters[cluster]) for cluster in order])
        starts = epoch * STAMPS_PER_EPOCH + np.cumsum(sizes) - sizes
        for place in range(first_step * self.world_size + self.rank, len(order), self.world_size):
            images = self.clusters[order[place]].tolist()
            yield list(zip(images, range(starts[place], starts[place] + len(images)), strict=True))
        self.statistics = Statistics(int(sizes.sum()), int(sizes.sum()), self.num_images)
