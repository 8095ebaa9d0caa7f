"""Samplers with farthest images and with clusters, against naive loops, over ranks, epochs, sizes and resumes."""

from collections import Counter

import numpy as np
import pytest

from data.samplers import (
    ClusterNeighbourSampler,
    ClusterSampler,
    NeighbourSampler,
    RandomSampler,
    Statistics,
    shuffled_clusters,
)
from runtime.errors import UserError

N, K = 61, 12
CLUSTERS = 5


def ring(n=N, k=K):
    """The j-th neighbour of image i is i + j + 1, and its j-th farthest is i - j - 1."""
    return (np.arange(n)[:, None] + np.arange(1, k + 1)) % n


def far_ring(n=N, k=K):
    return (np.arange(n)[:, None] - np.arange(1, k + 1)) % n


def labels_of(n=N, clusters=CLUSTERS, seed=0):
    """Clusters of unequal sizes."""
    generator = np.random.default_rng(seed)
    return generator.choice(clusters, n, p=generator.dirichlet(np.full(clusters, 2.0))).astype(np.int32)


def epoch_of(sampler, epoch=0, first_step=0):
    sampler.set_epoch(epoch, first_step)
    return list(sampler)


def indices(batch):
    return [index for index, _ in batch]


def every_kind(n=N, batch_size=8, **options):
    """One sampler of each kind."""
    labels = labels_of(n)
    return [
        RandomSampler(n, batch_size, **options),
        NeighbourSampler(ring(n), batch_size, 3, K, **options),
        NeighbourSampler(ring(n), batch_size, 3, K, far=far_ring(n), **options),
        ClusterSampler(labels, batch_size, **options),
        ClusterNeighbourSampler(ring(n), labels, batch_size, 3, K, **options),
        ClusterNeighbourSampler(ring(n), labels, batch_size, 3, 3, far=far_ring(n), **options),
    ]


# ---- what holds for all


@pytest.mark.parametrize("n", [16, 61, 200])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_divide_the_step_of_one_process(n, world_size):
    parts = zip(*(every_kind(n, seed=3, rank=r, world_size=world_size) for r in range(world_size)), strict=True)
    for whole, ranks in zip(every_kind(n, seed=3), parts, strict=True):
        for epoch in range(2):
            batches = epoch_of(whole, epoch)
            per_rank = [epoch_of(rank, epoch) for rank in ranks]
            assert {len(rank) for rank in per_rank} == {len(batches)}
            for step, batch in enumerate(batches):
                assert [key for rank in per_rank for key in rank[step]] == batch
            assert {rank.statistics for rank in ranks} == {whole.statistics}


@pytest.mark.parametrize("first_step", [0, 1, 2])
def test_resume_is_the_tail_of_the_epoch(first_step):
    for sampler, fresh in zip(every_kind(200, seed=1), every_kind(200, seed=1), strict=True):
        whole = epoch_of(sampler, 2)
        rest = epoch_of(fresh, 2, first_step)  # of a sampler that has never seen the epoch, as after a restart
        assert rest == whole[first_step:]
        assert len(fresh) == len(whole) - first_step
        assert epoch_of(fresh, 2) == whole
        end = len(whole)
        assert epoch_of(fresh, 2, end) == []
        with pytest.raises(UserError, match=f"{end} steps"):
            fresh.set_epoch(2, end + 1)


def test_length_is_known_before_and_after():
    for before, after in zip(every_kind(), every_kind(), strict=True):
        for epoch in range(3):
            batches = epoch_of(after, epoch)
            before.set_epoch(epoch)
            assert len(before) == len(after) == len(batches)
            assert list(before) == batches  # asking for the length first changes nothing


def test_epochs_and_seeds_differ():
    for kind in range(6):
        orders = {tuple(i for b in epoch_of(every_kind(seed=seed)[kind], epoch) for i in indices(b))
                  for seed in range(3) for epoch in range(3)}
        assert len(orders) == 9


def test_stamps_count_through_the_epoch():
    for sampler in every_kind():
        stamps = [stamp for batch in epoch_of(sampler, 3) for _, stamp in batch]
        assert stamps == list(range(3 * 2**40, 3 * 2**40 + len(stamps)))


def test_statistics_against_numpy():
    for sampler in every_kind():
        assert sampler.statistics is None
        for epoch, first_step in ((0, 0), (1, 0), (1, 1)):
            drawn = np.concatenate([indices(batch) for batch in epoch_of(sampler, epoch)])
            for _ in epoch_of(sampler, epoch, first_step):  # one that goes on in mid-epoch says the same of the epoch
                pass
            unique = len(np.unique(drawn))
            assert sampler.statistics == (len(drawn), unique, N)
            assert sampler.statistics.scalars() == {
                "images": len(drawn), "unique": unique, "repeats": len(drawn) - unique, "share_seen": unique / N}


def test_statistics_in_words():
    said = "2,000 images shown, 950 of 1,000 different ones (95.00 %), 1,050 repeats"
    assert str(Statistics(2000, 950, 1000)) == said


def test_no_image_is_left_out_for_ever():
    for sampler in every_kind(batch_size=16):
        shown = {i for epoch in range(30) for batch in epoch_of(sampler, epoch) for i in indices(batch)}
        assert shown == set(range(N))


# ---- farthest images


@pytest.mark.parametrize("nearest_k", [0, 1, 2, 3, 7, 11])
def test_half_near_and_half_far(nearest_k):
    near_k, far_k = nearest_k - nearest_k // 2, nearest_k // 2
    sampler = NeighbourSampler(ring(), 8, nearest_k, K, far=far_ring())
    places = Counter()
    for epoch in range(20):
        for batch in epoch_of(sampler, epoch):
            groups = np.array(indices(batch)).reshape(8, 1 + nearest_k)
            near = (groups[:, 1:1 + near_k] - groups[:, :1]) % N
            far = (groups[:, :1] - groups[:, 1 + near_k:]) % N
            assert near.shape[1] == near_k
            assert far.shape[1] == far_k
            for part in (near, far):
                assert ((part >= 1) & (part <= K)).all()
                assert all(len(set(row)) == len(row) for row in part.tolist())
            places.update(far.reshape(-1).tolist())
    assert set(places) == (set(range(1, K + 1)) if far_k else set())


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_equal_counts_take_the_nearest_and_the_farthest_in_order(k):
    for batch in epoch_of(NeighbourSampler(ring(), 8, k, k, far=far_ring())):
        groups = np.array(indices(batch)).reshape(8, 1 + k)
        offsets = [0, *range(1, k - k // 2 + 1), *(-j for j in range(1, k // 2 + 1))]
        assert ((groups - groups[:, :1] - offsets) % N == 0).all()


def test_near_and_far_draws_do_not_go_together():
    """Columns of the two halves are drawn apart: over many draws each pair of first places comes up."""
    sampler, pairs = NeighbourSampler(ring(k=4), 8, 2, 4, far=far_ring(k=4)), set()
    for epoch in range(30):
        for batch in epoch_of(sampler, epoch):
            groups = np.array(indices(batch)).reshape(8, 3)
            pairs |= set(zip(((groups[:, 1] - groups[:, 0]) % N).tolist(), ((groups[:, 0] - groups[:, 2]) % N).tolist(),
                             strict=True))
    assert pairs == {(a, b) for a in range(1, 5) for b in range(1, 5)}


# ---- cluster


@pytest.mark.parametrize("clusters", [1, 5, 20, 70])
@pytest.mark.parametrize("batch_size", [1, 4, 8, 61])
def test_cluster_batches(clusters, batch_size):
    """Each image at most once; as many batches out of a single cluster as the sizes allow."""
    labels = labels_of(clusters=clusters)
    sizes = np.bincount(labels)
    for epoch in range(3):
        batches = [indices(batch) for batch in epoch_of(ClusterSampler(labels, batch_size), epoch)]
        assert len(batches) == N // batch_size
        drawn = [i for batch in batches for i in batch]
        assert len(set(drawn)) == len(drawn) == N // batch_size * batch_size
        pure = sum(len(set(labels[batch].tolist())) == 1 for batch in batches)
        assert pure >= sum(size // batch_size for size in sizes)


def test_cluster_batches_change_within_and_between():
    labels = np.repeat(np.arange(4), 16)
    firsts, partners = set(), set()
    for epoch in range(40):
        batches = [indices(batch) for batch in epoch_of(ClusterSampler(labels, 8), epoch)]
        assert all(len(set(labels[batch].tolist())) == 1 for batch in batches)
        firsts.add(int(labels[batches[0][0]]))
        partners |= {i for batch in batches if 0 in batch for i in batch}
    assert firsts == set(range(4))
    assert partners == set(range(16))


@pytest.mark.parametrize("clusters", [1, 7, 70_000])
def test_shuffled_clusters(clusters):
    labels = np.random.default_rng(0).integers(clusters, size=500)
    images, sizes = shuffled_clusters(labels, np.random.default_rng(1))
    assert sorted(images.tolist()) == list(range(500))
    assert len(sizes) == labels.max() + 1
    ends = np.cumsum(sizes)
    found = [images[end - size:end] for size, end in zip(sizes, ends, strict=True) if size]
    assert all(len(set(labels[members].tolist())) == 1 for members in found)
    assert len(found) == len(np.unique(labels))


# ---- cluster+cf


def naive_turns(neighbours, labels, batch_size, coverage, seed, epoch):
    """Anchors of each step by the words of the docstring, with sets and lists; each anchor brings its whole row."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, 0))))
    images, sizes = shuffled_clusters(labels, generator)
    queues = [part.tolist() for part in np.split(images, np.cumsum(sizes)[:-1])]
    seen, anchors, turn = set(), [], 0
    live = [number for number, queue in enumerate(queues) if queue]
    while len(seen) < coverage * len(labels):
        step = []
        while len(step) < batch_size and live:
            queue = queues[live[turn]]
            while queue and queue[0] in seen:
                queue.pop(0)
            if queue:
                step.append(queue.pop(0))
            turn += 1
            if turn == len(live):
                live, turn = [number for number in live if queues[number]], 0
        before = {a for earlier in anchors for a in earlier} | set(step)
        for allowed in (lambda i: i not in before, lambda i: True):  # noqa: B023
            step += [i for i in images.tolist() if i not in step and allowed(i)][:batch_size - len(step)]
        anchors.append(step)
        seen |= set(step) | set(neighbours[step].reshape(-1).tolist())
    return anchors


@pytest.mark.parametrize("clusters", [1, 3, 20, 70])
@pytest.mark.parametrize(("batch_size", "k"), [(1, 3), (4, 0), (8, 3), (8, 12), (16, 1), (60, 2)])
@pytest.mark.parametrize("coverage", [0.3, 0.95, 1.0])
def test_turns_against_the_naive_loop(clusters, batch_size, k, coverage):
    labels = labels_of(clusters=clusters)
    for seed, epoch in ((0, 0), (5, 3)):
        sampler = ClusterNeighbourSampler(ring(), labels, batch_size, k, k, seed=seed, coverage=coverage)
        expected = naive_turns(ring()[:, :k], labels, batch_size, coverage, seed, epoch)
        found = [np.array(indices(batch)).reshape(batch_size, 1 + k) for batch in epoch_of(sampler, epoch)]
        assert [groups[:, 0].tolist() for groups in found] == expected
        for groups in found:
            assert (groups[:, 1:] == ring()[groups[:, 0], :k]).all()


@pytest.mark.parametrize("n", [20, 40, 61, 300])
@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_it_stops_when_enough_was_seen_and_not_before(n, batch_size):
    for coverage in (0.5, 0.95, 1.0):
        sampler = ClusterNeighbourSampler(ring(n), labels_of(n), batch_size, 3, 6, coverage=coverage)
        for epoch in range(4):
            batches = [indices(batch) for batch in epoch_of(sampler, epoch)]
            assert len(np.unique(np.concatenate(batches))) >= coverage * n
            before = [i for batch in batches[:-1] for i in batch]
            assert len(set(before)) < coverage * n


def test_no_anchor_was_shown_by_an_earlier_step():
    """With random neighbours, in all steps but an epoch's last."""
    neighbours = np.random.default_rng(0).integers(0, 500, (500, 20))
    sampler = ClusterNeighbourSampler(neighbours, labels_of(500, 9), 8, 5, 20)
    for epoch in range(5):
        seen, anchors = set(), []
        batches = epoch_of(sampler, epoch)
        for batch in batches[:-1]:
            step = indices(batch)[::6]
            assert not seen & set(step)
            anchors += step
            seen |= set(indices(batch))
        assert len(set(anchors)) == len(anchors)
        last = indices(batches[-1])[::6]
        assert len(set(last)) == 8
        unseen = set(range(500)) - seen
        assert unseen <= set(last) or set(last) <= unseen


def test_clusters_take_turns():
    """While all clusters have unseen images, any round holds each cluster once."""
    labels = np.repeat(np.arange(8), 50)
    sampler = ClusterNeighbourSampler(ring(400), labels, 4, 0, 0, coverage=0.9)
    anchors = [i for batch in epoch_of(sampler) for i in indices(batch)]
    rounds = labels[anchors].reshape(-1, 8)
    assert (np.sort(rounds, axis=1) == np.arange(8)).all()
    assert (rounds == rounds[0]).all()


def test_an_iteration_under_way_keeps_its_epoch():
    for ask_first in (False, True):
        sampler = ClusterNeighbourSampler(ring(), labels_of(), 8, 3, K)
        expected = epoch_of(sampler, 0)
        sampler = ClusterNeighbourSampler(ring(), labels_of(), 8, 3, K)
        if ask_first:
            len(sampler)
        iteration = iter(sampler)
        first = next(iteration)
        sampler.set_epoch(1)
        len(sampler)
        assert [first, *iteration] == expected


def test_the_first_step_reads_only_its_own_rows():
    """A table that refuses to be read for more than one step: nothing is composed ahead."""
    class OnceOnly:
        shape = (N, K)

        def __init__(self):
            self.reads = 0

        def __len__(self):
            return N

        def __getitem__(self, key):
            self.reads += 1
            assert self.reads == 1
            assert key[0].shape == (8, 1)
            return ring()[key]

    batch = next(iter(ClusterNeighbourSampler(OnceOnly(), labels_of(), 8, 3, K)))
    assert len(batch) == 32


# ---- sizes that do not fit


def message(build):
    with pytest.raises(UserError) as caught:
        build()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit():
    text = message(lambda: NeighbourSampler(ring(), 8, 3, 6, far=far_ring(k=5)))
    assert "--fark-info" in text
    assert "--total-k 6" in text
    text = message(lambda: NeighbourSampler(ring(), 8, 3, 6, far=far_ring(60)))
    assert "--fark-info holds 60 images and --closek-info 61" in text
    text = message(lambda: ClusterNeighbourSampler(ring(), labels_of(60), 8, 3, 6))
    assert "--cluster-info holds 60 images and --closek-info 61" in text
    for coverage in (0, -1, 1.5):
        text = message(lambda c=coverage: ClusterNeighbourSampler(ring(), labels_of(), 8, 3, 6, coverage=c))
        assert f"--coverage {coverage}" in text
    assert "--batch-size 62" in message(lambda: ClusterSampler(labels_of(), 62))
    assert "3 processes" in message(lambda: ClusterSampler(labels_of(), 8, 0, 3))
