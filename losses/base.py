"""The contract between a method and the training loop, which never names a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from runtime.collectives import SCOPES
from runtime.numbers import number
from runtime.settings import Setting

EPS = 1e-12  # F.normalize's, and so the original's
ROLES = ("student", "teacher", "momentum")  # the networks that see images


@dataclass(frozen=True)
class Needs:
    """What a loss asks of the loop, in plain values.

    ``views``: augmented views of each image in a batch. ``pairs``: batches are pairs, an anchor and then one of its
    nearest images. ``teacher``: what the student is compared with: the teacher's pooled ``features``, the output of its
    own ``head``, or None for no teacher. ``head``: the student's head, a name of models.heads.HEADS. ``momentum``:
    a momentum copy of the student. ``passes``: student forward passes for each image of a batch. ``gathers``: it
    collects the rows of all processes, so that each must have as many. ``apart``: the student sees the first view alone
    and the teacher the others. ``also``: what else the table of docs/METHODS.md names, such as a queue.
    """

    views: int = 1
    pairs: bool = False
    teacher: str | None = "features"
    head: str = "projection"
    momentum: bool = False
    passes: float = 1.0
    gathers: bool = False
    apart: bool = False
    also: str = ""


@dataclass(frozen=True)
class Recipe:
    """How the method's own paper trains a ResNet on ImageNet, which scripts/methods.sh repeats.

    ``batch``: anchors per step over all processes; the original uses ``gpus`` of them. ``sampler``, ``nearest_k``,
    ``total_k``, ``epochs``, ``warmup`` (None: the original CoSS code's), ``lr``, ``weight_decay``: as the flags of
    train_distill.py. ``flags``: additional flags, ``small``: those added for EfficientNet-B0, ``short``: those for the
    short trainings of scripts/compare_methods.sh. ``published``: linear top-1 / top-5 / 10-NN by student; ``note``:
    anything else that a reader of these numbers should know.
    """

    epochs: int
    lr: float
    batch: int = 256
    gpus: int = 8
    warmup: int | None = 0
    weight_decay: float = 1e-4
    sampler: str = "random"
    nearest_k: int = 0
    total_k: int = 0
    flags: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    published: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def images(self) -> int:
        """Of a step, the neighbours among them."""
        return self.batch * (1 + self.nearest_k)


@dataclass(frozen=True)
class CombinedNeeds:
    """What several losses need in one run.

    ``heads``: each of the student's heads once, as (its name, what it is compared with: ``Needs.teacher``).
    ``teacher``: each requested output of the teacher once; empty without a teacher.
    """

    views: int
    pairs: bool
    teacher: tuple[str, ...]
    heads: tuple[tuple[str, str | None], ...]
    momentum: bool
    passes: float
    gathers: bool
    apart: bool


@dataclass(frozen=True)
class Inputs:
    """What each network sees in a step: uint8 [b, 3, S, S] each. ``context``: further keywords of the loss."""

    student: Sequence[Tensor]
    teacher: Sequence[Tensor] = ()
    momentum: Sequence[Tensor] = ()
    context: Mapping[str, Any] = field(default_factory=dict)


class Loss(nn.Module):
    """An objective: no trainable parameters, possibly buffers (a queue), which checkpoints include.

    Arguments of its constructor that carry a :class:`runtime.settings.Setting` become flags of train_distill.py;
    ``dim`` and ``student_dim``, if it has them, are the widths of its target and of the student's features.
    ``recipe`` is its paper's training.

    It is called once a step, in training, with keywords: ``student`` [b, d] always; ``teacher`` and ``momentum`` [b, d]
    if ``needs`` names them, without gradient; and what :meth:`inputs` put into ``context``. A keyword is a tensor if
    :meth:`inputs` gave that network one batch of images, otherwise a tuple of tensors in the same order. It returns a
    dict of scalars: ``loss`` and its named parts.
    """

    needs = Needs()
    neighbour_batches = False  # whether scripts/compare_methods.sh gives it batches of neighbours, not of random images
    recipe = Recipe(epochs=25, lr=0.03, batch=64, gpus=4, warmup=None, sampler="cf", nearest_k=15, total_k=31,
                    note="by CoSS's recipe; no published row here")
    follows_rows = False  # whether it compares directions of rows with the teacher's, whatever their length
    settings: Mapping[str, Any] = {}  # the constructor's arguments, for a run's config.json
    epoch = 0  # the current epoch, from 0

    @property
    def per_process(self) -> bool:
        """Whether its value depends on how a batch is split over processes: it is computed over each process's part."""
        return "local" in self.settings.values()

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, for losses that change during training."""
        self.epoch = epoch

    def inputs(self, views: Sequence[Tensor], teachers: Sequence[Tensor]) -> Inputs:
        """Which network sees which of a batch's views, uint8 [b, 3, S, S] each: by default all see all views.

        ``teachers``: the same views, at the teacher's image size where that is another.
        """
        return Inputs(views, teachers if self.needs.teacher else (), views if self.needs.momentum else ())


def weights(text: str) -> list[float]:
    """``1,0.5`` as numbers; raises argparse.ArgumentTypeError."""
    return [number(float)(word) for word in text.split(",")]


# Settings that several losses share, each loss with its own default
RowWeight = Annotated[float, Setting("weight of the row term", "--l_0")]
SpaceWeight = Annotated[float, Setting("weight of the column (space similarity) term; the original's flag had 0.5",
                                       "--l_1")]
StudentTemperature = Annotated[float, Setting("student temperature", "--s-temp", above=0, metavar="T")]
TeacherTemperature = Annotated[float, Setting("teacher temperature", "--t-temp", above=0, metavar="T")]
SpaceBatch = Annotated[str, Setting(
    "the batch over which the statistics of a dimension are computed: local, each process's own, as in the original "
    "and the paper's rows, or global, that of all processes: loss and gradients then equal those of one process "
    "with the whole batch", choices=SCOPES)]
QueueSize = Annotated[int, Setting("earlier outputs to compare with, over all processes; 65,536 of 128 numbers take "
                                   "33.6 MB", least=1, metavar="K", shared=True)]


def full_precision(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it already is."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor, dim: int) -> Tensor:
    """``x / max(|x|, 1e-12)`` along ``dim``, with gradient zero where the vector is shorter than that.

    F.normalize's gradient there is 1e12 times the incoming one: a feature that is dead in the whole batch
    would overflow half precision, although the cosine of a zero vector has no slope to follow.
    """
    norm = x.norm(dim=dim, keepdim=True)
    direction = x / norm.clamp_min(EPS)
    return torch.where(norm > EPS, direction, direction.detach())
