"""Batches reach the main process whatever shared memory has room for, and a shortage is said once."""

import pickle

import pytest
import torch

from data import parcels
from data.augment import augmentation
from data.loader import build_loader, evaluation_loader
from data.parcels import Parcel
from data.samplers import RandomSampler
from data.sources import ArraySource

N, SIZE = 12, 16
PIXELS = torch.randint(0, 256, (N, 20, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
ROOMS = {"plenty": (10**12, 10**12), "full": (0, 64_000_000), "the last of it": (3 * 4 * SIZE**2, 64_000_000)}


def source():
    return ArraySource(PIXELS, None, [], "noise")


@pytest.fixture
def _said_anew():
    parcels._say_short.cache_clear()
    yield
    parcels._say_short.cache_clear()


@pytest.mark.usefixtures("_said_anew")
@pytest.mark.parametrize("room", ROOMS)
def test_training_and_evaluation_see_the_same_pixels_however_much_there_is(room, monkeypatch, capsys):
    def loaders(workers):
        sampler = RandomSampler(N, 4, seed=0)
        return (build_loader(source(), [augmentation("moco_v2", SIZE)] * 2, sampler, workers, 0, "cpu"),
                evaluation_loader(source(), SIZE, 4, workers))

    alone = [list(loader) for loader in loaders(0)]
    monkeypatch.setattr(parcels, "room", lambda: ROOMS[room])
    for expected, loader in zip(alone, loaders(1), strict=True):
        for a, b in zip(expected, loader, strict=True):
            assert torch.equal(a.indices, b.indices)
            assert all(map(torch.equal, a.views, b.views))
    said = capsys.readouterr().err
    assert said.count("\n") == (room != "plenty")
    assert ("--shm-size" in said) == (room != "plenty")


@pytest.mark.parametrize("error", [RuntimeError("unable to allocate shared memory(shm)"), OSError(24, "Too many")])
def test_room_that_another_took_first_is_no_failure(monkeypatch, error):
    def fails(self):
        raise error

    batch = ((torch.arange(6).view(2, 3).T,), {"a": [torch.ones(2)]}, "text")
    monkeypatch.setattr(torch.Tensor, "share_memory_", fails)
    parcel = Parcel.of(batch)
    assert not parcel.in_shared_memory
    (view,), others, text = pickle.loads(parcel.content)
    assert torch.equal(view, batch[0][0])
    assert view.stride() == batch[0][0].stride()  # a device is given the layout that was made
    assert torch.equal(others["a"][0], torch.ones(2))
    assert text == "text"


def test_what_is_free_is_compared_with_what_is_needed_and_a_part_is_left(monkeypatch):
    monkeypatch.setattr(parcels, "room", lambda: (30, 80))
    assert parcels.fits(20)
    assert not parcels.fits(21)
    monkeypatch.setattr(parcels, "room", lambda: None)  # a system that does not say
    assert parcels.fits(10**15)


def test_what_the_system_says(monkeypatch, tmp_path):
    monkeypatch.setattr(parcels, "SHARED", str(tmp_path))
    free, total = parcels.room()
    assert 0 < free <= total
    monkeypatch.setattr(parcels, "SHARED", str(tmp_path / "missing"))
    assert parcels.room() is None
