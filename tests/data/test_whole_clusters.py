"""Whole clusters as steps: by the draws of the original's, torch's DistributedSampler with a new end."""

import numpy as np
import pytest
import torch
from torch.utils.data.distributed import DistributedSampler

from data.samplers import WholeClusterSampler
from runtime.errors import UserError

LABELS = np.random.default_rng(0).integers(0, 11, 97)


def originals(labels, rank, world_size, epoch):
    """Its batches: a permutation of the clusters after seed 0 + epoch, every world_size-th from rank on."""
    groups = {cluster: np.flatnonzero(labels == cluster).tolist() for cluster in range(labels.max() + 1)}
    there = DistributedSampler(range(len(labels)), world_size, rank, shuffle=True, seed=0)
    generator = torch.Generator()
    generator.manual_seed(there.seed + epoch)
    order = torch.randperm(len(groups), generator=generator).tolist()[there.rank:there.total_size:there.num_replicas]
    return [groups[cluster] for cluster in order]


def drawn(sampler, epoch, first_step=0):
    sampler.set_epoch(epoch, first_step)
    return list(sampler)


@pytest.mark.parametrize("world_size", [1, 2, 3, 11])
@pytest.mark.parametrize("epoch", [0, 4])
def test_the_originals_draws(world_size, epoch):
    for rank in range(world_size):
        sampler = WholeClusterSampler(LABELS, rank, world_size)
        steps = [[image for image, _ in step] for step in drawn(sampler, epoch)]
        expected = originals(LABELS, rank, world_size, epoch)
        assert steps == expected[:11 // world_size]
        assert len(steps) == sampler.steps_in(epoch)


def test_every_image_has_its_own_stamp_whatever_the_number_of_ranks():
    alone = dict(key for step in drawn(WholeClusterSampler(LABELS), 3) for key in step)
    assert len(set(alone.values())) == len(alone) == 97
    for rank in range(2):
        for step in drawn(WholeClusterSampler(LABELS, rank, 2), 3):
            assert all(alone[image] == stamp for image, stamp in step)


def test_goes_on_in_the_middle_of_an_epoch():
    sampler = WholeClusterSampler(LABELS, 1, 2)
    assert drawn(sampler, 2, 3) == drawn(WholeClusterSampler(LABELS, 1, 2), 2)[3:]
    assert sampler.statistics == statistics_of(2)


def statistics_of(epoch):
    other = WholeClusterSampler(LABELS, 0, 2)
    seen = [image for rank in range(2) for step in drawn(WholeClusterSampler(LABELS, rank, 2), epoch)
            for image, _ in step]
    drawn(other, epoch)
    assert (other.statistics.images, other.statistics.unique) == (len(seen), len(set(seen)))
    return other.statistics


def test_clusters_without_images_are_left_out():
    sampler = WholeClusterSampler(np.array([0, 0, 3, 3, 3]))
    assert sorted(len(step) for step in drawn(sampler, 0)) == [2, 3]
    assert (sampler.num_clusters, sampler.images_per_step) == (4, 2)


def test_fewer_clusters_than_processes():
    with pytest.raises(UserError, match="2 clusters, fewer than the 3 processes"):
        WholeClusterSampler(np.array([0, 1, 1]), 0, 3)
