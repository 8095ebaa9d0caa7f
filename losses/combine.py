"""One loss or several, weighted: the objective that the loop calls."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from losses.base import ROLES, Inputs, Loss, Needs
from runtime.errors import UserError

Outputs = Sequence[Tensor]


class Objective(Loss):
    """``beta`` times the weighted sum of losses by name; each is given just what it asked for.

    What several losses ask for alike (the very same tensor) goes through a network once. With one loss its parts
    keep their names; with several they are ``name/part``, ``name/loss`` among them, each before its weight.
    """

    def __init__(self, losses: Mapping[str, Loss], weights: Sequence[float] | None = None, beta: float = 1.0) -> None:
        super().__init__()
        self.needs = combined({name: loss.needs for name, loss in losses.items()})
        self.losses = nn.ModuleDict(losses)
        self.weights, self.beta = list(weights or [1.0] * len(losses)), beta

    def set_epoch(self, epoch: int) -> None:
        for loss in self.losses.values():
            loss.set_epoch(epoch)

    def inputs(self, views: Sequence[Tensor]) -> Inputs:
        """The images for each network; a loss that needs fewer views than the others gets the first of them."""
        asked = {name: loss.inputs(views[:loss.needs.views]) for name, loss in self.losses.items()}
        distinct: dict[str, list[Tensor]] = {role: [] for role in ROLES}
        places = {name: {role: [_place(distinct[role], x) for x in getattr(wanted, role)] for role in ROLES}
                  for name, wanted in asked.items()}
        return Inputs(**distinct, context={"places": places, "extra": {k: v.context for k, v in asked.items()}})

    def forward(self, *, student: Outputs, teacher: Outputs = (), momentum: Outputs = (),
                places: Mapping[str, Mapping[str, list[int]]], extra: Mapping[str, Mapping[str, Any]],
                ) -> dict[str, Tensor]:
        """The outputs [b, d] of each network for its :meth:`inputs`, in that order, and their context.

        Returns scalars: ``loss``, and the losses' parts. Call it once a step: queues are filled here.
        """
        given = {"student": student, "teacher": teacher, "momentum": momentum}
        total, parts = 0.0, {}
        for (name, loss), weight in zip(self.losses.items(), self.weights, strict=True):
            keywords = {role: [given[role][i] for i in where] for role, where in places[name].items() if where}
            found = loss(**{role: x[0] if len(x) == 1 else tuple(x) for role, x in keywords.items()}, **extra[name])
            total = total + weight * found["loss"]
            alone = len(self.losses) == 1
            parts |= found if alone else {f"{name}/{part}": value for part, value in found.items()}
        return {**parts, "loss": self.beta * total}


def combined(needs: Mapping[str, Needs]) -> Needs:
    """What a sum of losses needs; raises :class:`UserError` where two of them cannot be had in one run."""
    for first, second in itertools.combinations(needs, 2):
        one, two = needs[first], needs[second]
        for said, a, b in (("the teacher's", one.teacher or two.teacher, two.teacher or one.teacher),
                           ("the student's head", one.head, two.head),
                           ("batches of", *("pairs" if n.bag else "single images" for n in (one, two)))):
            if a != b:
                raise UserError(f"--loss {'+'.join(needs)}: {first} needs {said} {a} and {second} {said} {b}, and a "
                                "run has one of the two; add up losses that need the same")
    every = list(needs.values())
    return Needs(max(n.views for n in every), every[0].bag, next((n.teacher for n in every if n.teacher), None),
                 every[0].head, any(n.momentum for n in every), max(n.passes for n in every))


def _place(tensors: list[Tensor], tensor: Tensor) -> int:
    """Where this very tensor stands in the list, appended if it does not."""
    for i, other in enumerate(tensors):
        if other is tensor:
            return i
    tensors.append(tensor)
    return len(tensors) - 1
