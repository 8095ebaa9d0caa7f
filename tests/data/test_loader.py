"""Batches: shapes, the same views whatever the workers, ranks and resumes."""

import pickle
import random
import signal

import numpy as np
import pytest
import torch
from helpers.noise import SIZE, N, Source, augment, epoch_of, same
from PIL import Image

from data.augment import SIGMA, augmentation, view_keys
from data.colour import apply_colour
from data.loader import Batch, ViewDataset, WorkerLoader, build_loader, evaluation_loader
from data.parcels import packed
from data.samplers import NeighbourSampler, RandomSampler
from runtime.errors import UserError


class Counting(Source):
    """Counts how often an image is opened."""

    opened = 0

    def open(self, i):
        self.opened += 1
        return super().open(i)

    def pixels(self, i):
        self.opened += 1
        return super().pixels(i)


class Reporting(Source):
    """Shows the state of the worker it runs in."""

    def open(self, i):
        state = torch.get_num_threads(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN, 0
        return Image.fromarray(np.full((40, 40, 3), state, np.uint8))


def whole(keys, **options):
    """A batch made here, of two views."""
    return ViewDataset(Source(), [augment()] * 2, **{"seed": 0, "path": "fast", **options}).__getitems__(keys)


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
        assert batch.colour == ()
        assert batch.decoded == 4
    assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(N))


def test_views_may_differ_in_size():
    sampler = RandomSampler(N, 4)
    batch = next(iter(build_loader(Source(), [augment(), augment(8)], sampler, 0, 0, "cpu")))
    assert [view.shape[-1] for view in batch.views] == [SIZE, 8]


@pytest.mark.parametrize("path", ["fast", "pil"])
@pytest.mark.parametrize("later", [False, True])
def test_a_second_size_is_the_same_crops_at_that_size_and_leaves_the_first_as_it_is(path, later):
    keys = [(3, 7), (8, 9), (3, 11)]
    def views(*sizes):
        found = ViewDataset(Source(), [augmentation("moco_v2", *sizes)] * 2, 0, path, later).__getitems__(keys)
        return found.views, found.colour
    (small, colour), (large, _), (both, of_both) = views(SIZE), views(40), views(SIZE, 40)
    assert [x.shape[-1] for x in both] == [SIZE, SIZE, 40, 40]
    assert all(map(torch.equal, both, (*small, *large)))
    if colour:  # the two are coloured alike, but for the blur, which hides the same share of either
        for row, (a, b) in enumerate(zip(of_both[:2], of_both[2:], strict=True)):
            assert a.equal(colour[row])
            assert a[:, :SIGMA].equal(b[:, :SIGMA])
            torch.testing.assert_close(a[:, SIGMA] * 40 / SIZE, b[:, SIGMA])


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


@pytest.mark.parametrize("path", ["fast", "pil"])
def test_workers_do_not_change_a_pixel(path):
    alone = epoch_of(0, seed=7, broken=[3, 4], path=path)
    helped = epoch_of(2, seed=7, broken=[3, 4], path=path)
    assert len(alone) == len(helped) == 5
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_how_workers_are_started_does_not_change_a_pixel(start):
    dataset = ViewDataset(Source([2]), [augment()], seed=3, path="fast")
    keys = [(i, 100 + i) for i in range(4)]
    loader = WorkerLoader(dataset, batch_sampler=[keys], collate_fn=packed, num_workers=1,
                          multiprocessing_context=start)
    assert same(next(iter(loader)), dataset.__getitems__(keys))


@pytest.mark.parametrize("views", [1, 2])
def test_both_paths_show_the_same(views):
    for fast, pil in zip(epoch_of(views=views), epoch_of(views=views, path="pil"), strict=True):
        assert torch.equal(fast.indices, pil.indices)
        for a, b in zip(fast.views, pil.views, strict=True):
            assert (a.float() - b.float()).abs().mean((1, 2, 3)).max() < 1.5
            assert a.float().std() > 20


@pytest.mark.parametrize("path", ["fast", "pil"])
def test_an_image_is_opened_once_for_all_its_views_in_a_batch(path):
    source = Counting()
    dataset = ViewDataset(source, [augment()] * 2, 0, path)
    keys = [(3, 10), (5, 11), (3, 12), (3, 13), (7, 14)]
    batch = dataset.__getitems__(keys)
    assert source.opened == batch.decoded == 3
    for row, key in enumerate(keys):
        alone = dataset.__getitems__([key])
        assert all(torch.equal(view[row], one[0]) for view, one in zip(batch.views, alone.views, strict=True))


def test_repeats_are_reported():
    neighbours = np.zeros((N, 1), np.int64)  # everybody's neighbour is image 0
    loader = build_loader(Source(), [augment()], NeighbourSampler(neighbours, 4, 1, 1), 0, 0, "cpu")
    decoded = sum(batch.decoded for batch in loader)
    assert f"{1 - decoded / 40:.1%}" in loader.repeats()
    assert loader.repeats() == ""
    assert decoded <= 25
    list(random_loader := build_loader(Source(), [augment()], RandomSampler(N, 4), 0, 0, "cpu"))
    assert random_loader.repeats() == ""


def test_colour_can_be_left_to_the_device():
    keys = [(i, 50 + i) for i in range(6)]
    later, now = whole(keys, colour_later=True), whole(keys)
    assert now.colour == ()
    assert len(later.colour) == 2
    for number, (view, colour) in enumerate(zip(later.views, later.colour, strict=True)):
        drawn = augment().draw(view_keys(0, np.arange(50, 56), number))
        assert np.array_equal(colour, drawn.colour)
        assert torch.equal(apply_colour(view, colour), now.views[number])
        assert not torch.equal(view, now.views[number])


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
    view = [whole([key]).views[0] for key in [(3, 8), (3, 8), (3, 9), (4, 8), 3, (3, 3), np.int64(3)]]
    assert torch.equal(view[0], view[1])
    assert not torch.equal(view[0], view[2])
    assert not torch.equal(view[0], view[3])
    assert torch.equal(view[4], view[5])
    assert torch.equal(view[4], view[6])
    assert len(ViewDataset(Source(), [augment()], seed=0)) == N


def test_workers_use_one_thread_each_and_leave_ctrl_c_to_the_main_process():
    for batch in evaluation_loader(Reporting(), SIZE, 10, 1):
        assert (batch.views[0][:, 0] == 1).all()
        assert (batch.views[0][:, 1] == 1).all()


def test_data_set_and_batch_pickle():
    dataset = ViewDataset(Source(), [augment(), augment(8)], seed=2)
    batch = dataset.__getitems__([1, 4])
    assert same(pickle.loads(pickle.dumps(dataset)).__getitems__([1, 4]), batch)
    assert same(pickle.loads(pickle.dumps(batch)), batch)


def test_pinning_keeps_the_batch_a_batch(monkeypatch):
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self.clone())  # the real one needs a GPU
    batch = whole([(i, i) for i in range(4)], colour_later=True)._replace(bad=[(1, "reason")])
    pinned = pin_memory(batch)
    assert isinstance(pinned, Batch)
    assert len(pinned.views) == 2
    assert torch.equal(pinned.views[1], batch.views[1])
    assert torch.equal(pinned.colour[1], batch.colour[1])
    assert [tuple(entry) for entry in pinned.bad] == batch.bad


def test_pinning_is_for_cuda_only():
    for device_type, pinned in [("cuda", True), ("cpu", False)]:
        training = build_loader(Source(), [augment()], RandomSampler(N, 4), 0, 0, device_type)
        assert training.loader.pin_memory is pinned
        assert training.loader.dataset.colour_later is pinned
        assert evaluation_loader(Source(), SIZE, 4, 0, device_type=device_type).pin_memory is pinned


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_card():
    sampler = RandomSampler(N, 4, seed=0)
    there = list(build_loader(Source([7]), [augment()] * 2, sampler, 1, 0, "cuda"))
    for a, b in zip(there, epoch_of(broken=[7]), strict=True):
        assert torch.equal(a.indices, b.indices)
        for x, y in zip(a.views, b.views, strict=True):
            assert x.is_cuda
            assert (x.cpu().float() - y.float()).abs().mean((1, 2, 3)).max() < 0.5


def test_advice_names_the_ways_out():
    for path in ("fast", "pil"):
        advice = build_loader(Source(), [augment()], RandomSampler(N, 4), 2, 0, "cpu", path).advice()
        assert "--workers (now 2)" in advice
        assert "--cache device" in advice
        assert ("--data-path fast" in advice) is (path == "pil")


def test_unknown_path():
    with pytest.raises(UserError, match="--data-path quick.*fast, pil"):
        build_loader(Source(), [augment()], RandomSampler(N, 4), 0, 0, "cpu", "quick")
