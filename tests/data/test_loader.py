"""Batches: shapes, the same views whatever the workers, ranks and resumes, images that cannot be opened."""

import pickle
import random
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment import eval_transform, training_transform
from data.images import BadImage
from data.loader import BadImageLog, Batch, ViewDataset, build_loader, collate, evaluation_loader
from data.samplers import NeighbourSampler, RandomSampler
from data.sources import ArraySource
from runtime.errors import UserError

N, SIZE = 20, 16
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 20, 24, 3), dtype=np.uint8)


class Source(ArraySource):
    """Noise; the images named in broken cannot be opened."""

    def __init__(self, broken=()):
        super().__init__(IMAGES, np.arange(N) % 4, list("abcd"), "noise")
        self.broken = set(broken)

    def open(self, i):
        if i in self.broken:
            raise BadImage(f"broken {i}")
        return super().open(i)


def augment():
    return training_transform("moco_v2", SIZE)


def report_state(image):
    """A transform that shows the state of the worker it runs in."""
    return torch.tensor([torch.get_num_threads(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN])


def same(a, b):
    return (
        len(a.views) == len(b.views)
        and all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
        and torch.equal(a.indices, b.indices)
        and a.bad == b.bad
    )


def epoch_of(workers=0, epoch=0, first_step=0, seed=0, views=2, batch_size=4, broken=(), **ranks):
    sampler = RandomSampler(N, batch_size, seed=seed, **ranks)
    sampler.set_epoch(epoch, first_step)
    return list(build_loader(Source(broken), [augment()] * views, sampler, workers, seed, "cpu"))


@pytest.mark.parametrize("views", [1, 2, 3])
def test_batches(views):
    batches = epoch_of(views=views)
    assert len(batches) == 5
    for batch in batches:
        assert isinstance(batch, Batch)
        assert isinstance(batch.views, tuple)
        assert len(batch.views) == views
        assert all(view.dtype == torch.uint8 and view.shape == (4, 3, SIZE, SIZE) for view in batch.views)
        assert batch.indices.dtype == torch.int64
        assert batch.bad == []
        unpacked, indices, bad = batch
        assert unpacked is batch.views
    assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(N))


def test_views_may_differ_in_size():
    sampler = RandomSampler(N, 4)
    batch = next(iter(build_loader(Source(), [augment(), eval_transform(8)], sampler, 0, 0, "cpu")))
    assert [view.shape[-1] for view in batch.views] == [SIZE, 8]


def test_views_of_an_image_differ_from_one_another_and_over_epochs_and_seeds():
    key_of = {}
    for seed in range(2):
        for epoch in range(2):
            for batch in epoch_of(epoch=epoch, seed=seed):
                for number, view in enumerate(batch.views):
                    for index, pixels in zip(batch.indices.tolist(), view, strict=True):
                        key_of.setdefault(pixels.numpy().tobytes(), []).append((seed, epoch, number, index))
    assert len(key_of) == 2 * 2 * 2 * N
    assert all(len(keys) == 1 for keys in key_of.values())


def test_workers_do_not_change_a_pixel():
    alone = epoch_of(0, seed=7, broken=[3, 4])
    helped = epoch_of(2, seed=7, broken=[3, 4])
    assert len(alone) == len(helped) == 5
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_spawned_workers_do_not_change_a_pixel():
    dataset = ViewDataset(Source([2]), [augment()], seed=3)
    keys = [(i, 100 + i) for i in range(4)]
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=[keys], collate_fn=collate, num_workers=1, multiprocessing_context="spawn"
    )
    assert same(next(iter(loader)), collate([dataset[key] for key in keys]))


def test_persistent_workers_follow_the_sampler():
    sampler = RandomSampler(N, 4, seed=1)
    loader = build_loader(Source(), [augment()], sampler, 1, 1, "cpu")
    for epoch in (0, 1, 5):
        sampler.set_epoch(epoch, first_step=epoch % 3)
        expected = epoch_of(0, epoch, epoch % 3, seed=1, views=1)
        got = list(loader)
        assert len(got) == len(expected) == len(loader)
        assert all(same(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_what_one_process_sees(world_size):
    alone = epoch_of(epoch=1)
    parts = [epoch_of(epoch=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(alone):
        for v in range(2):
            assert torch.equal(batch.views[v], torch.cat([part[step].views[v] for part in parts]))
        assert torch.equal(batch.indices, torch.cat([part[step].indices for part in parts]))


@pytest.mark.parametrize("first_step", [0, 1, 4])
def test_resume_sees_the_tail(first_step):
    rest, whole = epoch_of(epoch=2, first_step=first_step), epoch_of(epoch=2)
    assert len(rest) == 5 - first_step
    assert all(same(a, b) for a, b in zip(rest, whole[first_step:], strict=True))


def test_neighbour_batches():
    neighbours = (np.arange(N)[:, None] + np.arange(1, 5)) % N
    sampler = NeighbourSampler(neighbours, 2, 3, 3)
    loader = build_loader(Source(), [augment()], sampler, 0, 0, "cpu")
    for batch in loader:
        groups = batch.indices.reshape(2, 4)
        assert ((groups - groups[:, :1]) % N == torch.arange(4)).all()
        assert batch.views[0].shape == (8, 3, SIZE, SIZE)


def test_the_callers_random_state_is_left_alone():
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    epoch_of(0)
    epoch_of(1, views=1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


def test_views_do_not_depend_on_the_callers_random_state():
    torch.manual_seed(1)
    first = epoch_of()
    torch.manual_seed(2)
    assert all(same(a, b) for a, b in zip(first, epoch_of(), strict=True))


def test_stamp_decides_the_view_and_index_the_image():
    dataset = ViewDataset(Source(), [augment()], seed=0)
    assert torch.equal(dataset[(3, 8)][0][0], dataset[(3, 8)][0][0])
    assert not torch.equal(dataset[(3, 8)][0][0], dataset[(3, 9)][0][0])
    assert not torch.equal(dataset[(3, 8)][0][0], dataset[(4, 8)][0][0])
    assert torch.equal(dataset[3][0][0], dataset[(3, 3)][0][0])
    assert torch.equal(dataset[np.int64(3)][0][0], dataset[3][0][0])
    assert len(dataset) == N


def test_workers_use_one_thread_each_and_leave_ctrl_c_to_the_main_process():
    loader = build_loader(Source(), [report_state], RandomSampler(N, 10), 1, 0, "cpu")
    assert all((batch.views[0] == 1).all() for batch in loader)


def test_data_set_and_batch_pickle():
    dataset = pickle.loads(pickle.dumps(ViewDataset(Source(), [augment(), eval_transform(8)], seed=2)))
    assert torch.equal(dataset[1][0][0], ViewDataset(Source(), [augment()], seed=2)[1][0][0])
    batch = epoch_of()[0]
    assert same(pickle.loads(pickle.dumps(batch)), batch)


def test_pinning_keeps_the_batch_a_batch(monkeypatch):
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # the real one needs a GPU
    batch = epoch_of(broken=[7])[0]
    pinned = pin_memory(batch)
    assert isinstance(pinned, Batch)
    assert len(pinned.views) == 2
    assert torch.equal(pinned.views[1], batch.views[1])
    assert [tuple(entry) for entry in pinned.bad] == batch.bad


def test_pinning_is_for_cuda_only():
    for device_type, pinned in [("cuda", True), ("cpu", False), ("mps", False)]:
        training = build_loader(Source(), [augment()], RandomSampler(N, 4), 0, 0, device_type)
        assert training.pin_memory is pinned
        assert evaluation_loader(Source(), SIZE, 4, 0, device_type=device_type).pin_memory is pinned


# ---- evaluation


@pytest.mark.parametrize("batch_size", [1, 7, 20, 50])
def test_evaluation_is_in_order_and_whole(batch_size):
    batches = list(evaluation_loader(Source(), SIZE, batch_size, 0))
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(N))
    assert [len(batch.indices) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    pixels = torch.cat([batch.views[0] for batch in batches])
    expected = torch.stack([eval_transform(SIZE)(Image.fromarray(image)) for image in IMAGES])
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize("indices", [[5, 3, 3, 19], range(4, 9), np.array([7, 1]), []])
def test_evaluation_of_some(indices):
    batches = list(evaluation_loader(Source(), SIZE, 3, 0, indices))
    assert [i for batch in batches for i in batch.indices.tolist()] == list(indices)


def test_evaluation_with_workers():
    alone, helped = (list(evaluation_loader(Source([4]), SIZE, 6, workers)) for workers in (0, 2))
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


# ---- images that cannot be opened


@pytest.mark.parametrize("broken", [[0], [5, 6], list(range(1, N))])
def test_bad_images_are_replaced_and_reported(broken):
    dataset = ViewDataset(Source(broken), [eval_transform(SIZE)], seed=0)
    whole = {ViewDataset(Source(), [eval_transform(SIZE)], 0)[i][0][0].numpy().tobytes(): i for i in range(N)}
    for stamp in range(30):
        views, index, bad = dataset[(broken[0], stamp)]
        assert index == broken[0]
        assert bad[0] == (broken[0], f"broken {broken[0]}")
        assert all(i in broken for i, _ in bad)
        if views:
            assert whole[views[0].numpy().tobytes()] not in broken
        else:
            assert len(bad) == 9
        assert pickle.dumps(dataset[(broken[0], stamp)][2]) == pickle.dumps(bad)


def test_replacements_vary():
    dataset = ViewDataset(Source([0]), [eval_transform(SIZE)], seed=0)
    assert len({dataset[(0, stamp)][0][0].numpy().tobytes() for stamp in range(60)}) > 10


def test_good_images_of_the_batch_are_untouched():
    for broken, whole in zip(epoch_of(broken=[7]), epoch_of(), strict=True):
        good = whole.indices != 7
        assert torch.equal(broken.indices, whole.indices)
        assert torch.equal(broken.views[0][good], whole.views[0][good])
        assert [i for i, _ in broken.bad] == ([] if good.all() else [7])


@pytest.mark.parametrize("workers", [0, 1])
def test_when_nothing_can_be_opened_the_batch_says_so(workers):
    batches = epoch_of(workers, broken=range(N))
    assert all(batch.views == () and len(batch.bad) == 4 * 9 for batch in batches)
    log = BadImageLog(Source(range(N)), "skip")
    with pytest.raises(UserError, match="noise/") as caught:
        log.check(batches[0])
    assert "\n" not in str(caught.value)


def test_error_policy_names_the_file_and_the_way_out():
    log = BadImageLog(Source(), "error")
    for batch in epoch_of():
        log.check(batch)
    assert log.summary() == "every image could be opened"
    (bad,) = (batch for batch in epoch_of(broken=[7]) if batch.bad)
    with pytest.raises(UserError) as caught:
        log.check(bad)
    text = str(caught.value)
    assert "noise/000007" in text
    assert "broken 7" in text
    assert "--on-bad-image skip" in text
    assert "\n" not in text
    assert not caught.value.every_process  # only the process that met it can name it


def test_skip_policy_counts():
    log = BadImageLog(Source(), "skip")
    for epoch in range(3):
        for batch in epoch_of(epoch=epoch, broken=[7]):
            log.check(batch)
    summary = log.summary()
    assert "\n" not in summary
    assert "noise/000007 (broken 7)" in summary
    assert "opened: 1," in summary
    assert log.counts[7] >= 3
    assert f"{log.counts[7]} times" in summary


def test_long_summary_is_cut():
    log = BadImageLog(Source(), "skip")
    log.check(Batch((torch.zeros(1),), torch.zeros(1), [(i, "r") for i in range(12)]))
    assert log.summary().count("noise/") == 5
    assert log.summary().endswith("...")


def test_unknown_policy():
    with pytest.raises(UserError, match="--on-bad-image ignore"):
        BadImageLog(Source(), "ignore")
