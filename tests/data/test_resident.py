"""Images kept in memory give the batches that opening them each time gives."""

import numpy as np
import pytest
import torch

import data.resident
from data.augment import augmentation
from data.images import BadImage
from data.loader import build_loader
from data.samplers import NeighbourSampler, RandomSampler
from data.sources import ArraySource
from runtime.errors import UserError

N = 24
y, x = np.mgrid[:40, :36]
SMOOTH = [127 + 120 * np.sin(x / (4 + i % 5) + i) * np.cos(y / (5 + i % 3)) for i in range(N)]
IMAGES = np.stack([np.stack([s, 255 - s, np.roll(s, i)], -1) for i, s in enumerate(SMOOTH)]).astype(np.uint8)


class Source(ArraySource):
    """Smooth pictures; those named in broken cannot be opened, those in odd are smaller."""

    def __init__(self, broken=(), odd=()):
        super().__init__(IMAGES, None, [], "smooth")
        self.broken, self.odd, self.opened = broken, odd, 0

    def pixels(self, i):
        self.opened += 1
        if i in self.broken:
            raise BadImage(f"broken {i}")
        return super().pixels(i)[:, : 30 if i in self.odd else 40]


def batches(cache, source=None, epoch=0, sampler=None, size=32, views=2, device="cpu"):
    sampler = sampler or RandomSampler(N, 6, seed=1)
    sampler.set_epoch(epoch)
    return list(build_loader(source or Source(), [augmentation("moco_v2", size)] * views, sampler, 0, 1, device,
                             cache=cache))


def compare(a, b):
    assert len(a) == len(b) > 0
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert sorted(one.bad) == sorted(other.bad)
        assert len(one.views) == len(other.views)
        for u, v in zip(one.views, other.views, strict=True):
            assert u.dtype == torch.uint8
            assert u.shape == v.shape
            assert (u.float() - v.float()).abs().mean((1, 2, 3)).max() < 1.5


def test_a_second_size_is_the_same_crops_at_that_size():
    def views(*sizes):
        sampler = RandomSampler(N, 6, seed=1)
        return next(iter(build_loader(Source(), [augmentation("moco_v2", *sizes)], sampler, 0, 1, "cpu", cache="host"))
                    ).views
    assert all(map(torch.equal, views(20, 32), (*views(20), *views(32))))


@pytest.mark.parametrize("cache", ["host", "device"])
@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("size", [20, 64])
def test_views_are_those_of_the_loader(cache, epoch, size):
    compare(batches(cache, epoch=epoch, size=size), batches("none", epoch=epoch, size=size))


def test_neighbour_batches():
    neighbours = (np.arange(N)[:, None] + np.arange(1, 4)) % N
    samplers = [NeighbourSampler(neighbours, 3, 1, 3, seed=2) for _ in range(2)]
    compare(batches("device", sampler=samplers[0]), batches("none", sampler=samplers[1]))


def test_each_image_is_opened_once_in_all_epochs():
    source, sampler = Source(), RandomSampler(N, 6)
    loader = build_loader(source, [augmentation("moco_v2", 32)], sampler, 0, 0, "cpu", cache="device")
    assert source.opened == N
    first, second = ([batch.views[0] for batch in loader] for _ in range(2) if sampler.set_epoch(_) is None)
    assert source.opened == N
    assert len(loader) == len(first) == 4
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert loader.repeats() == loader.advice() == ""


def test_threads_decode_in_order():
    loader = build_loader(Source(), [augmentation("moco_v2", 32)], RandomSampler(N, 6), 3, 0, "cpu", cache="host")
    assert np.array_equal(loader.images.permute(0, 2, 3, 1), IMAGES)


@pytest.mark.parametrize("broken", [[0], [5, 6], range(1, N), range(N)])
def test_bad_images_are_replaced_as_by_the_loader(broken):
    compare(batches("host", Source(broken)), batches("none", Source(broken)))


def test_several_sizes_are_refused():
    with pytest.raises(UserError, match=r"--cache host needs images of one size, but smooth/000000 has 36 x 40 "
                                        r"pixels and smooth/000007 has 36 x 30; omit --cache") as caught:
        batches("host", Source(odd=[7, 9]))
    assert "\n" not in str(caught.value)


def test_more_than_memory_is_refused(monkeypatch):
    monkeypatch.setattr(data.resident, "free_memory", lambda device: N * 3 * 36 * 40 - 1)
    with pytest.raises(UserError, match=f"--cache device needs .* GiB for {N} images"):
        batches("device")
    monkeypatch.setattr(data.resident, "free_memory", lambda device: N * 3 * 36 * 40)
    assert batches("device")


def test_pil_cannot_make_whole_batches():
    with pytest.raises(UserError, match="--cache host .*--data-path pil"):
        build_loader(Source(), [], RandomSampler(N, 6), 0, 0, "cpu", "pil", "host")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cache", ["host", "device"])
def test_on_a_card(cache):
    there = [batch._replace(views=tuple(view.cpu() for view in batch.views)) for batch in batches(cache, device="cuda")]
    compare(there, batches("none"))
