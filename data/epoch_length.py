"""Epochs with a chosen number of steps, independent of the sampler's own epochs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Annotated

import numpy as np

from data.samplers.random_order import RandomSampler
from runtime.settings import Setting


class FixedLengthEpochs(RandomSampler):
    """The steps of the epochs 0, 1, 2, ... of ``inner``, divided into epochs of ``epoch_steps`` steps. No
    step is skipped or changed.

    The length of an epoch depends on the sampler: with 15 neighbours per anchor, an epoch shows sixteen times as many
    images as without. This makes schedules, scores and checkpoints of methods with different samplers comparable.
    """

    def __init__(self, inner: RandomSampler, epoch_steps: Annotated[int, Setting(
            "number of steps that count as one epoch for the schedule, the scores and the checkpoints, so that methods "
            "with different samplers can be compared; the order of images does not change; default: the sampler's own "
            "epochs", least=1, metavar="N")]) -> None:
        super().__init__(inner.num_images, inner.batch_size, inner.rank, inner.world_size, inner.seed)
        self.inner, self.steps = inner, epoch_steps
        self.group_size, self.far_k, self.num_clusters = inner.group_size, inner.far_k, inner.num_clusters
        self.table_fingerprints = inner.table_fingerprints

    def steps_in(self, epoch: int) -> int:
        return self.steps

    def _steps(self, epoch: int, first_step: int) -> Iterator[np.ndarray]:
        inner_epoch, step = 0, epoch * self.steps + first_step
        while step >= self.inner.steps_in(inner_epoch):
            step -= self.inner.steps_in(inner_epoch)
            inner_epoch += 1
        whole_epochs = (self.inner._steps(e, step if e == inner_epoch else 0) for e in itertools.count(inner_epoch))
        yield from itertools.islice(itertools.chain.from_iterable(whole_epochs), self.steps - first_step)
