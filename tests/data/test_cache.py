"""The pool in shared memory: the same pixels with it and without, in any kind of worker."""

import pickle

import numpy as np
import pytest
import torch
from helpers.ranks import PREPARED
from torch.utils.data import DataLoader, Dataset

from data import cache
from data.cache import CachedSource
from data.images import BadImage
from data.sources import ArraySource
from runtime.errors import UserError

N, SHAPE = 12, (20, 30, 3)
SIZE = 20 * 30 * 3
IMAGES = np.random.default_rng(0).integers(0, 256, (N, *SHAPE), dtype=np.uint8)


class Counted(ArraySource):
    """Counts its own decoding; image 5 is broken."""

    def __init__(self):
        super().__init__(IMAGES, np.arange(N) % 3, list("abc"), "noise")
        self.decoded = []

    def open(self, i):
        if i == 5:
            raise BadImage("broken")
        self.decoded.append(i)
        return super().open(i)

    def pixels(self, i):
        return torch.from_numpy(np.array(self.open(i))).permute(2, 0, 1)


def pixels(i):
    return torch.from_numpy(IMAGES[i]).permute(2, 0, 1)


def test_the_second_time_comes_from_the_pool():
    inner = Counted()
    source = CachedSource(inner, 1e-3)
    assert source.hit_rate() == 0
    for i in (3, 1, 3, 3):
        assert torch.equal(source.pixels(i), pixels(i))
    assert inner.decoded == [3, 1]
    assert source.hit_rate() == 0.5
    assert "2 of 12 images" in source.summary()
    assert "hit rate 50.0 %" in source.summary()
    source.pixels(3).zero_()  # the caller's own copy
    assert torch.equal(source.pixels(3), pixels(3))
    assert np.array_equal(source.open(1), IMAGES[1])
    assert source.encoded(1) is None
    with pytest.raises(BadImage):
        source.pixels(5)


def test_a_full_pool_keeps_what_it_has():
    inner = Counted()
    source = CachedSource(inner, (3 * SIZE + 10) / 1e9)
    for _ in range(2):
        for i in (0, 1, 2, 3, 4):
            assert torch.equal(source.pixels(i), pixels(i))
    assert inner.decoded == [0, 1, 2, 3, 4, 3, 4]
    assert source.hit_rate() == 0.3


def test_parts_share_the_pool():
    inner = Counted()
    source = CachedSource(inner, 1e-3)
    part = source.take(np.array([4, 2])).take(np.array([1]))
    assert torch.equal(part.pixels(0), pixels(2))
    assert torch.equal(source.pixels(2), pixels(2))
    assert inner.decoded == [2]
    assert part.location(0) == inner.location(2)
    assert source.subset(0.5).labels.tolist() == inner.subset(0.5).labels.tolist()
    assert source.fingerprint() == inner.fingerprint()


class Pixels(Dataset):
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        return i, self.source.pixels(i)


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), (PREPARED, 1)], ids=["fork", "sent"])
def test_workers_share_the_pool(context, workers):
    source = CachedSource(ArraySource(IMAGES, None, [], "noise"), 1e-3)
    loader = DataLoader(Pixels(source), batch_size=2, num_workers=workers, multiprocessing_context=context,
                        persistent_workers=True)
    for _ in range(2):
        seen = {int(i): image for indices, images in loader for i, image in zip(indices, images, strict=True)}
        assert seen.keys() == set(range(N))
        assert all(torch.equal(seen[i], pixels(i)) for i in range(N))
    assert source.hit_rate() == 0.5  # seen from here, what the workers found
    assert all(torch.equal(source.pixels(i), pixels(i)) for i in range(N))
    assert source.hit_rate() == 2 / 3


def test_what_is_sent_to_a_worker_has_no_names_of_its_own():
    source = CachedSource(Counted(), 1e-6)
    assert source.__getstate__()["names"] is None
    assert list(source.take(np.array([2, 1])).__getstate__()["names"]) == [source.names[2], source.names[1]]
    with pytest.raises((RuntimeError, AssertionError)):  # a lock goes to a child as it starts, and nowhere else
        pickle.dumps(source)


def test_no_room(monkeypatch):
    monkeypatch.setattr(cache, "room", lambda: (4_096_000, 64_000_000))
    with pytest.raises(UserError, match="--image-cache 1.0 GB does not fit into /dev/shm, where 4.1 MB are free"):
        CachedSource(Counted(), 1)
