"""Samplers against a naive loop, over ranks, epochs and resumes."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from data.samplers import STAMPS_PER_EPOCH, NeighbourSampler, RandomSampler
from runtime.errors import UserError

N, K = 61, 12


def ring(n=N, k=K):
    """The j-th neighbour of image i is i + j + 1, so that an index tells which neighbour was drawn."""
    return (np.arange(n)[:, None] + np.arange(1, k + 1)) % n


def epoch_of(sampler, epoch=0, first_step=0):
    sampler.set_epoch(epoch, first_step)
    return list(sampler)


def indices(batch):
    return [index for index, _ in batch]


def neighbour_sampler(nearest_k=3, total_k=K, batch_size=8, **options):
    return NeighbourSampler(ring(), batch_size, nearest_k, total_k, **options)


def both(**options):
    return [RandomSampler(N, options.pop("batch_size", 8), **options), neighbour_sampler(**options)]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 8, 60, 61])
def test_random_epoch_is_a_permutation_without_its_tail(batch_size):
    batches = epoch_of(RandomSampler(N, batch_size))
    assert len(batches) == N // batch_size
    drawn = [index for batch in batches for index in indices(batch)]
    assert len(drawn) == len(set(drawn)) == N // batch_size * batch_size
    assert set(drawn) <= set(range(N))
    assert all(len(batch) == batch_size for batch in batches)
    assert all(type(index) is int and type(stamp) is int for batch in batches for index, stamp in batch)


def test_epochs_and_seeds_differ_and_repeat():
    orders = {
        (seed, epoch): tuple(i for b in epoch_of(RandomSampler(N, 1, seed=seed), epoch) for i in indices(b))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(set(orders.values())) == 16
    for (seed, epoch), order in orders.items():
        again = epoch_of(RandomSampler(N, 1, seed=seed), epoch)
        assert tuple(i for b in again for i in indices(b)) == order


def test_dropped_images_rotate():
    sampler = RandomSampler(10, 4)
    dropped = [set(range(10)) - {i for b in epoch_of(sampler, epoch) for i in indices(b)} for epoch in range(40)]
    assert all(len(d) == 2 for d in dropped)
    assert set.union(*dropped) == set(range(10))


def naive_epoch(neighbours, batch_size, nearest_k, total_k, seed, epoch):
    """The recipe written out: anchors in the permutation's order, each followed by drawn neighbours."""

    def generator(stream):
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, stream))))

    order = generator(0).permutation(len(neighbours))
    stamp = epoch * 2**40
    for step in range(len(neighbours) // batch_size):
        draws = generator(step + 1).random((batch_size, total_k))
        batch = []
        for a in range(batch_size):
            anchor = order[step * batch_size + a]
            kept = set(sorted(range(total_k), key=lambda j, a=a: draws[a, j])[:nearest_k])
            batch.append((anchor, {neighbours[anchor, j] for j in kept}, stamp))
            stamp += 1 + nearest_k
        yield batch


@pytest.mark.parametrize("seed", [0, 5, 2**40])
@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("nearest_k", [0, 1, 3, 11])
def test_neighbour_sampler_against_the_naive_loop(seed, epoch, nearest_k):
    batches = epoch_of(neighbour_sampler(nearest_k, seed=seed), epoch)
    expected = list(naive_epoch(ring(), 8, nearest_k, K, seed, epoch))
    assert len(batches) == len(expected)
    for batch, groups in zip(batches, expected, strict=True):
        assert len(batch) == 8 * (1 + nearest_k)
        for a, (anchor, followers, stamp) in enumerate(groups):
            group = batch[a * (1 + nearest_k) : (a + 1) * (1 + nearest_k)]
            assert group[0] == (anchor, stamp)
            assert set(indices(group[1:])) == followers
            assert len(group) - 1 == len(followers) == nearest_k
            assert [s for _, s in group] == list(range(stamp, stamp + 1 + nearest_k))


@pytest.mark.parametrize("total_k", [1, 2, 5, 12])
def test_neighbours_are_distinct_and_among_the_nearest(total_k):
    for nearest_k in range(total_k + 1):
        for batch in epoch_of(neighbour_sampler(nearest_k, total_k)):
            groups = np.array(indices(batch)).reshape(8, 1 + nearest_k)
            places = (groups[:, 1:] - groups[:, :1]) % N
            assert ((places >= 1) & (places <= total_k)).all()
            assert all(len(set(row)) == nearest_k for row in places.tolist())


@pytest.mark.parametrize("k", [1, 4, 12])
def test_all_neighbours_come_in_order(k):
    for batch in epoch_of(neighbour_sampler(k, k)):
        groups = np.array(indices(batch)).reshape(8, 1 + k)
        assert ((groups - groups[:, :1]) % N == np.arange(k + 1)).all()


def test_no_neighbours_is_the_random_sampler():
    for epoch in range(3):
        assert epoch_of(neighbour_sampler(0), epoch) == epoch_of(RandomSampler(N, 8), epoch)


def test_draws_are_uniform():
    counts = Counter()
    sampler = NeighbourSampler(ring(), 8, 3, K)
    epochs = 60
    for epoch in range(epochs):
        for batch in epoch_of(sampler, epoch):
            groups = np.array(indices(batch)).reshape(8, 4)
            counts.update(((groups[:, 1:] - groups[:, :1]) % N).reshape(-1).tolist())
    expected = epochs * (N // 8) * 8 * 3 / K
    assert set(counts) == set(range(1, K + 1))
    for place, count in counts.items():
        assert abs(count - expected) < 5 * expected**0.5, place


def test_draws_change_with_the_step_and_the_epoch():
    sampler = NeighbourSampler(ring(8, 6), 8, 3, 6)
    seen = set()
    for epoch in range(10):
        (batch,) = epoch_of(sampler, epoch)
        groups = sorted(tuple(row) for row in np.array(indices(batch)).reshape(8, 4).tolist())
        seen.add(tuple(groups))
    assert len(seen) == 10


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_divide_the_step_of_one_process(world_size):
    for whole, parts in zip(
        both(seed=3),
        zip(*(both(seed=3, rank=r, world_size=world_size) for r in range(world_size)), strict=True),
        strict=True,
    ):
        for epoch in range(2):
            per_rank = [epoch_of(part, epoch) for part in parts]
            for step, batch in enumerate(epoch_of(whole, epoch)):
                assert [key for rank in per_rank for key in rank[step]] == batch
        for part in parts:
            assert part.images_per_step * world_size == whole.images_per_step
            assert part.global_images_per_step == whole.global_images_per_step == whole.images_per_step
            assert len(part) == len(whole)


def test_a_rank_keeps_an_anchor_and_its_neighbours_together():
    for rank in range(4):
        for batch in epoch_of(neighbour_sampler(3, 3, rank=rank, world_size=4)):
            groups = np.array(indices(batch)).reshape(2, 4)
            assert ((groups - groups[:, :1]) % N == np.arange(4)).all()


@pytest.mark.parametrize("first_step", range(8))
def test_resume_is_the_tail_of_the_epoch(first_step):
    for sampler in both(seed=1):
        whole = epoch_of(sampler, 2)
        rest = epoch_of(sampler, 2, first_step)
        assert rest == whole[first_step:]
        assert len(sampler) == len(rest) == 7 - first_step
        sampler.set_epoch(3)
        assert len(sampler) == 7


def test_stamps_are_unique_over_a_run():
    for sampler in both():
        stamps = [stamp for epoch in range(5) for batch in epoch_of(sampler, epoch) for _, stamp in batch]
        assert len(stamps) == len(set(stamps))
        assert stamps == sorted(stamps)
        assert stamps[0] == 0
        assert max(stamps) < 5 * STAMPS_PER_EPOCH
    sampler.set_epoch(1_000_000)
    assert next(iter(sampler))[0][1] == 1_000_000 * 2**40 < 2**63


def test_sizes():
    sampler = neighbour_sampler(3, batch_size=8, world_size=4, rank=1)
    assert (sampler.images_per_step, sampler.global_images_per_step) == (8, 32)
    assert all(len(batch) == 8 for batch in sampler)
    paper = NeighbourSampler(np.broadcast_to(np.zeros((1, 384), np.int64), (1000, 384)), 64, 15, 384, 0, 4)
    assert (paper.images_per_step, paper.global_images_per_step) == (256, 1024)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16, ">i8"])
def test_any_integer_type_and_memory_maps(dtype, tmp_path):
    np.save(tmp_path / "k.npy", ring().astype(dtype))
    mapped = np.load(tmp_path / "k.npy", mmap_mode="r")
    assert epoch_of(NeighbourSampler(mapped, 8, 3, K)) == epoch_of(neighbour_sampler())


def test_iteration_is_lazy():
    sampler = RandomSampler(1_000_000, 10)
    assert len(sampler) == 100_000
    assert len(list(islice(sampler, 3))) == 3


def test_an_iteration_under_way_keeps_its_epoch():
    sampler = RandomSampler(N, 8)
    expected = epoch_of(sampler, 0)
    iteration = iter(sampler)
    first = next(iteration)
    sampler.set_epoch(1, 4)
    assert [first, *iteration] == expected


def message(build):
    with pytest.raises(UserError) as caught:
        build()
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "kind",
    [lambda **o: RandomSampler(N, **o), lambda **o: NeighbourSampler(ring(), nearest_k=1, total_k=2, **o)],
)
def test_wrong_batch_sizes(kind):
    text = message(lambda: kind(batch_size=10, world_size=4))
    assert text.startswith("--batch-size 10 cannot be divided evenly among 4 processes; ")
    assert "8 or 12" in text
    assert "give 4" in message(lambda: kind(batch_size=3, world_size=4))
    assert "--batch-size 62" in message(lambda: kind(batch_size=62))
    assert "61 images" in message(lambda: kind(batch_size=62))
    for batch_size in (0, -4):
        assert f"--batch-size {batch_size}" in message(lambda b=batch_size: kind(batch_size=b))
    assert "--seed -1" in message(lambda: kind(batch_size=8, seed=-1))
    with pytest.raises(ValueError, match="rank"):
        kind(batch_size=8, rank=2, world_size=2)


def test_wrong_neighbour_counts():
    assert "--nearest-k 5 is more than --total-k 4" in message(lambda: neighbour_sampler(5, 4))
    assert "--nearest-k -1" in message(lambda: neighbour_sampler(-1, 4))
    text = message(lambda: neighbour_sampler(3, K + 1))
    assert f"--total-k {K + 1}" in text
    assert f"{K} neighbours" in text
    assert "--closek-info" in text


@pytest.mark.parametrize("step", [-1, 8])
def test_a_step_outside_the_epoch(step):
    with pytest.raises(UserError, match="--resume: .* now has only 7 steps; give the same --batch-size"):
        RandomSampler(N, 8).set_epoch(0, step)


@pytest.mark.parametrize("num_images", [16, 17, 40, 61, 63])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["random", "cf"])
def test_every_rank_takes_the_same_steps_and_no_image_is_left_out_for_ever(num_images, world_size, kind):
    """Equal parts of the steps of one process, and what an epoch leaves out is another each time."""
    def sampler(rank, ranks):
        if kind == "cf":
            return NeighbourSampler(ring(num_images), 16, 2, K, rank=rank, world_size=ranks)
        return RandomSampler(num_images, 16, rank, ranks)

    ranks, whole = [sampler(rank, world_size) for rank in range(world_size)], sampler(0, 1)
    seen: set[int] = set()
    for epoch in range(60):
        parts, steps = [epoch_of(rank, epoch) for rank in ranks], epoch_of(whole, epoch)
        assert {len(part) for part in parts} == {len(steps)} == {num_images // 16}
        assert {len(batch) for part in parts for batch in part} == {len(steps[0]) // world_size}
        assert [[key for part in parts for key in part[step]] for step in range(len(steps))] == steps
        seen |= {batch[anchor][0] for batch in steps for anchor in range(0, len(batch), whole.group_size)}
    assert seen == set(range(num_images))


@pytest.mark.parametrize("first_step", [0, 1, 5, 7])
def test_statistics_of_an_epoch_that_was_gone_on_with_are_the_epochs(first_step):
    for sampler in both():
        epoch_of(sampler, 3)
        whole = sampler.statistics
        sampler.statistics = None
        epoch_of(sampler, 3, first_step)
        assert sampler.statistics == whole
