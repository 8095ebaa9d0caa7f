"""The contract between a method and the training loop, which never names a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

EPS = 1e-12  # F.normalize's, and so the original's
ROLES = ("student", "teacher", "momentum")  # the networks that see images


@dataclass(frozen=True)
class Needs:
    """What a loss asks of the loop, in plain values.

    ``views``: augmented views of each image in a batch. ``bag``: batches are pairs, an anchor and then one of its
    nearest images. ``teacher``: what it is compared with, the teacher's pooled ``features``, the output of its own
    ``head``, or None, no teacher at all. ``head``: the student's head, a name of models.heads.HEADS. ``momentum``:
    a momentum copy of the student. ``passes``: student forward passes for each image of a batch.
    """

    views: int = 1
    bag: bool = False
    teacher: str | None = "features"
    head: str = "projection"
    momentum: bool = False
    passes: float = 1.0


@dataclass(frozen=True)
class Together:
    """What several losses need together, where it is not the same for all.

    ``heads``: each of the student's heads once, as (its name, what it is compared with: ``Needs.teacher``).
    ``teacher``: each of the teacher's outputs that are asked for once; empty if there is no teacher.
    """

    views: int
    bag: bool
    teacher: tuple[str, ...]
    heads: tuple[tuple[str, str | None], ...]
    momentum: bool
    passes: float


@dataclass(frozen=True)
class Inputs:
    """What each network sees in a step: uint8 [b, 3, S, S] each. ``context``: further keywords of the loss."""

    student: Sequence[Tensor]
    teacher: Sequence[Tensor] = ()
    momentum: Sequence[Tensor] = ()
    context: Mapping[str, Any] = field(default_factory=dict)


class Loss(nn.Module):
    """An objective: no parameters that train, possibly buffers (a queue), which are part of a checkpoint.

    It is called once a step, in training, with keywords: ``student`` [b, d] always; ``teacher`` and ``momentum`` [b, d]
    where ``needs`` names them, without gradient; what :meth:`inputs` left in ``context``. A keyword is a tensor where
    :meth:`inputs` gave that network one batch of images, else a tuple of tensors in the same order. It returns a dict
    of scalars: ``loss`` and its named parts.
    """

    needs = Needs()
    settings: Mapping[str, Any] = {}  # the constructor's arguments, for a run's config.json
    epoch = 0  # from 0 on, of the epoch that is going on

    @property
    def per_process(self) -> bool:
        """Whether its value depends on how a batch is shared among processes, as one does that is taken over the batch
        of each."""
        return "local" in self.settings.values()

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, for what changes during training."""
        self.epoch = epoch

    def inputs(self, views: Sequence[Tensor]) -> Inputs:
        """Who sees what of a batch's views, uint8 [b, 3, S, S] each: here everyone sees them as they are."""
        return Inputs(views, views if self.needs.teacher else (), views if self.needs.momentum else ())


def full_precision(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it already is."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor, dim: int) -> Tensor:
    """``x / max(|x|, 1e-12)`` along ``dim``, with gradient zero where the vector is shorter than that.

    F.normalize's gradient there is 1e12 times the incoming one: a feature that is dead in the whole batch
    would overflow half precision, although a cosine with nothing has no slope to follow.
    """
    norm = x.norm(dim=dim, keepdim=True)
    direction = x / norm.clamp_min(EPS)
    return torch.where(norm > EPS, direction, direction.detach())
