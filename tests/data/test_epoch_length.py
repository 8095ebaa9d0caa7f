"""The steps of a sampler's epochs, cut anew: against the sampler's own epochs laid end to end."""

import numpy as np
import pytest

from data.epoch_length import FixedLengthEpochs
from data.samplers import ClusterNeighbourSampler, ClusterSampler, NeighbourSampler, RandomSampler

GENERATOR = np.random.default_rng(0)
NEIGHBOURS = np.stack([GENERATOR.permutation(np.delete(np.arange(23), i))[:7] for i in range(23)])
LABELS = np.arange(23) % 4
SAMPLERS = {"random": lambda **where: RandomSampler(23, 4, **where),
            "cf": lambda **where: NeighbourSampler(NEIGHBOURS, 4, 2, 7, **where),
            "cluster": lambda **where: ClusterSampler(LABELS, 4, **where),
            "cluster+cf": lambda **where: ClusterNeighbourSampler(NEIGHBOURS, LABELS, 4, 2, 7, **where)}


def epoch_of(sampler, epoch, first_step=0):
    sampler.set_epoch(epoch, first_step)
    return list(sampler)


def indices(steps):
    return [[index for index, _ in step] for step in steps]


@pytest.mark.parametrize("steps", [1, 3, 5, 6, 17])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_steps_are_the_samplers_own_in_their_order(name, steps):
    whole = [step for epoch in range(40) for step in indices(epoch_of(SAMPLERS[name](seed=3), epoch))]
    cut = FixedLengthEpochs(SAMPLERS[name](seed=3), steps)
    shown = []
    for epoch in range(4):
        cut.set_epoch(epoch)
        assert len(cut) == steps
        shown += indices(cut)
    assert shown == whole[:4 * steps]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_start_in_the_middle_other_ranks_and_stamps(name):
    whole = epoch_of(FixedLengthEpochs(SAMPLERS[name](), 7), 2)
    assert epoch_of(FixedLengthEpochs(SAMPLERS[name](), 7), 2, first_step=3) == whole[3:]
    ranks = [epoch_of(FixedLengthEpochs(SAMPLERS[name](rank=rank, world_size=2), 7), 2) for rank in range(2)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == whole
    stamps = [stamp for epoch in range(3) for step in epoch_of(FixedLengthEpochs(SAMPLERS[name](), 7), epoch)
              for _, stamp in step]
    assert len(set(stamps)) == len(stamps)


def test_what_it_says_of_itself_is_the_samplers():
    inner = SAMPLERS["cf"]()
    cut = FixedLengthEpochs(inner, 7)
    assert cut.global_images_per_step == inner.global_images_per_step == 12
    list(cut)
    assert cut.statistics.images == 7 * 12
    assert cut.statistics.total == 23
