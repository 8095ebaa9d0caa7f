"""One loss or several, weighted: the objective that the loop calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from torch import Tensor, nn

from losses.base import ROLES, CombinedNeeds, Inputs, Loss, Needs, weights
from runtime.errors import UserError
from runtime.settings import Setting

Outputs = Sequence[Tensor]
LossWeights = Annotated[Sequence[float] | None, Setting(
    "comma-separated weights, one for each loss of a sum; default 1 each", parse=weights, metavar="W,W")]
Beta = Annotated[float, Setting("factor of the total loss; default {default}", above=0, metavar="W")]


class Objective(Loss):
    """``beta`` times the weighted sum of losses by name; each receives only what it asked for.

    If several losses ask for the same tensor, it goes through a network once. With one loss its parts
    keep their names; with several they are ``name/part``, ``name/loss`` among them, each before its weight.
    """

    def __init__(self, losses: Mapping[str, Loss], loss_weights: LossWeights = None, beta: Beta = 1.0) -> None:
        super().__init__()
        self.needs: CombinedNeeds = combined_needs({name: loss.needs for name, loss in losses.items()})
        self.losses = nn.ModuleDict(losses)
        self.follows_rows = any(loss.follows_rows for loss in losses.values())
        self.weights, self.beta = list(loss_weights or [1.0] * len(losses)), beta

    @property
    def per_process(self) -> bool:
        return any(loss.per_process for loss in self.losses.values())

    def set_epoch(self, epoch: int) -> None:
        for loss in self.losses.values():
            loss.set_epoch(epoch)

    def inputs(self, views: Sequence[Tensor]) -> Inputs:
        """The images for each network; a loss that needs fewer views than the others gets the first of them.

        ``views``: as many as ``needs.views``, each at the image size of the network that sees it; where both see them,
        at the student's, and then the same at the teacher's.
        """
        teachers = views[self.needs.views:] or views
        asked = {name: loss.inputs(views[:loss.needs.views], teachers[:loss.needs.views])
                 for name, loss in self.losses.items()}
        distinct: dict[str, list[Tensor]] = {role: [] for role in ROLES}
        places = {name: {role: [_place(distinct[role], x) for x in getattr(wanted, role)] for role in ROLES}
                  for name, wanted in asked.items()}
        return Inputs(**distinct, context={"places": places, "extra": {k: v.context for k, v in asked.items()}})

    def forward(self, *, student: Outputs, teacher: Outputs = (), momentum: Outputs = (),
                places: Mapping[str, Mapping[str, list[int]]], extra: Mapping[str, Mapping[str, Any]],
                ) -> dict[str, Tensor]:
        """The outputs [b, d] of each network for its :meth:`inputs`, in that order, and their context.

        The student and its momentum copy give one output for each head in ``needs.heads`` for the first input, then
        as many for the second; likewise the teacher for each in ``needs.teacher``. Returns scalars: ``loss``, and
        the losses' parts. Call it once a step: queues are filled here.
        """
        given = {"student": student, "teacher": teacher, "momentum": momentum}
        total, parts = 0.0, {}
        for (name, loss), weight in zip(self.losses.items(), self.weights, strict=True):
            found = loss(**self._keywords(loss.needs, given, places[name]), **extra[name])
            total = total + weight * found["loss"]
            alone = len(self.losses) == 1
            parts |= found if alone else {f"{name}/{part}": value for part, value in found.items()}
        return {"loss": self.beta * total, **{name: part for name, part in parts.items() if name != "loss"}}

    def _keywords(self, needs: Needs, given: Mapping[str, Outputs], places: Mapping[str, list[int]],
                  ) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """One loss's share of the outputs: its own head's, for its own inputs."""
        head = self.needs.heads.index((needs.head, needs.teacher)), len(self.needs.heads)
        answer = (self.needs.teacher.index(needs.teacher) if needs.teacher else 0), len(self.needs.teacher)
        keywords = {}
        for role, (which, of) in zip(ROLES, (head, answer, head), strict=True):
            found = tuple(given[role][i * of + which] for i in places[role])
            if found:
                keywords[role] = found[0] if len(found) == 1 else found
        return keywords


def combined_needs(needs: Mapping[str, Needs]) -> CombinedNeeds:
    """What a sum of losses needs; raises :class:`UserError` if they cannot be combined in one run."""
    every = list(needs.values())
    for name, wanted in needs.items():
        if wanted.pairs != every[0].pairs:
            pairs, single = (name, next(iter(needs)))[::1 if wanted.pairs else -1]
            raise UserError(f"--loss {'+'.join(needs)}: {pairs} needs batches of pairs and {single} of single images; "
                            "add up losses that need the same")
    return CombinedNeeds(max(n.views for n in every), every[0].pairs,
                    tuple(dict.fromkeys(n.teacher for n in every if n.teacher)),
                    tuple(dict.fromkeys((n.head, n.teacher) for n in every)),
                    any(n.momentum for n in every), max(n.passes for n in every),
                    any(n.gathers or n.momentum for n in every), all(n.apart for n in every))


def _place(tensors: list[Tensor], tensor: Tensor) -> int:
    """The index of this very tensor in the list; appends it if it is not there."""
    for i, other in enumerate(tensors):
        if other is tensor:
            return i
    tensors.append(tensor)
    return len(tensors) - 1
