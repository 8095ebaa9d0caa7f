"""Images of noise in memory, some of which may not open, and the batches that the loader makes of them."""

import numpy as np
import torch

from data.augment import augmentation
from data.images import BadImage
from data.loader import build_loader
from data.samplers import RandomSampler
from data.sources import ArraySource

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

    def pixels(self, i):
        if i in self.broken:
            raise BadImage(f"broken {i}")
        return super().pixels(i)


def augment(size=SIZE):
    return augmentation("moco_v2", size)


def same(a, b):
    return (
        len(a.views) == len(b.views)
        and all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
        and torch.equal(a.indices, b.indices)
        and a.bad == b.bad
        and a.decoded == b.decoded
    )


def epoch_of(workers=0, epoch=0, first_step=0, seed=0, views=2, batch_size=4, broken=(), path="fast", **ranks):
    sampler = RandomSampler(N, batch_size, seed=seed, **ranks)
    sampler.set_epoch(epoch, first_step)
    return list(build_loader(Source(broken), [augment()] * views, sampler, workers, seed, "cpu", path))
