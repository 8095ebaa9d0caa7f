"""The objectives by name, and sums of them.

A loss is a :class:`losses.base.Loss`: its ``needs`` say what it asks of the loop (views, a teacher's features or
head, a momentum student, pairs of neighbours), its ``inputs`` which images each network sees. It is called with
keyword arguments, ``student=`` and, if it asked for them, ``teacher=`` and ``momentum=``: a tensor [b, d] where the
network saw one batch of images, a tuple of tensors where it saw several (two views). It returns a dict of scalars:
``loss`` and its parts. The loop calls the :class:`losses.combine.Objective` that holds it; in a sum each loss has
its own student head unless two want the same one.

FILE.py:NAME stands for a loss of one's own, by the same contract (losses.own); messages and logs call it NAME.

To add one: a file with the citation, the formula and the paper's recipe, and a line in ``LOSSES``. Constructor
arguments that carry a :class:`runtime.settings.Setting` become flags; a flag that is not given keeps the
method's own default.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from losses.base import CombinedNeeds, Loss, Recipe
from losses.bingo import BINGO
from losses.combine import Objective, combined_needs
from losses.compress import CompRess
from losses.coss import CentredCoSS, CoSS
from losses.dino import DINO, DINOSS
from losses.disco import DisCo
from losses.dist import DIST
from losses.moco import MoCo
from losses.own import own_loss, try_out
from losses.regression import MSE, Cosine
from losses.rkd import RKD
from losses.seed import SEED
from losses.smd import SMD
from runtime.errors import UserError
from runtime.own import is_own
from runtime.settings import Declared, declared_among

LOSSES: dict[str, type[Loss]] = {
    "coss": CoSS, "coss_centred": CentredCoSS, "seed": SEED, "compress": CompRess, "bingo": BINGO, "disco": DisCo,
    "smd": SMD, "dist": DIST, "dino": DINO, "dinoss": DINOSS, "cosine": Cosine, "mse": MSE, "rkd": RKD, "moco": MoCo,
}


def build_loss(name: str, **options: Any) -> Loss:
    """The loss called ``name``, built with those of ``options`` that its constructor accepts and that are not None."""
    kind = loss_of(name)
    defaults = {key: x.default for key, x in inspect.signature(kind).parameters.items()
                if x.kind is x.POSITIONAL_OR_KEYWORD}
    arguments = {key: default if options.get(key) is None else options[key] for key, default in defaults.items()}
    if not is_own(name):
        loss = kind(**arguments)
    else:
        own = own_loss(name)[0]
        with own.blamed("while it is built"):
            loss = kind(**{key: value for key, value in arguments.items() if value is not inspect.Parameter.empty})
        try_out(own, loss, options.get("dim"), options.get("student_dim"))
    loss.settings = arguments
    return loss


def build_objective(names: str, weights: Sequence[float] | None = None, beta: float = 1.0,
                    widths: Mapping[str | None, int] | None = None, **options: Any) -> Objective:
    """``beta`` times the sum of the losses in ``names`` (``coss`` or ``coss+seed``), each with its weight (or 1).

    ``widths``: the width of the outputs given to a loss, by what they are compared with (``Needs.teacher``).
    """
    needs_of(names)
    return Objective({called(name): build_loss(name, dim=(widths or {}).get(loss_of(name).needs.teacher), **options)
                      for name in names.split("+")}, weights, beta)


def needs_of(names: str) -> CombinedNeeds:
    """What the losses in ``names`` need together; raises :class:`UserError` if they cannot be combined."""
    split = names.split("+")
    needs = {called(name): loss_of(name).needs for name in split}
    for name in split:
        if len(needs) < len(split) and [called(x) for x in split].count(called(name)) > 1:
            raise UserError(f"--loss {names} names {called(name)} twice; name it once, with a weight in --loss-weights")
    return combined_needs(needs)


def recipe_of(names: str) -> Recipe:
    """Of the losses in ``names``, the recipe with the lowest rate for an image."""
    return min((loss_of(name).recipe for name in names.split("+")), key=lambda recipe: recipe.lr / recipe.images)


def settings(names: Iterable[str] = LOSSES) -> dict[str, dict[str, Declared]]:
    """The settings that these losses declare: {setting: {loss: its declaration, with its own default}}."""
    names = list(names)
    try:
        return declared_among({called(name): loss_of(name) for name in names})
    except TypeError as error:
        own = next(filter(is_own, names), None)
        if not own:
            raise
        raise own_loss(own)[0].error(f"cannot have these settings ({error})", "rename it, or take the annotation of "
                                     "losses/base.py where it is the same setting") from None


def loss_of(name: str) -> type[Loss]:
    """The class of that name, or of one's own FILE.py:NAME."""
    if is_own(name):
        return own_loss(name)[1]
    if name not in LOSSES:
        raise UserError(f"--loss {name} is unknown; choose from {', '.join(sorted(LOSSES))}, a sum of them with +, or "
                        "FILE.py:NAME of your own")
    return LOSSES[name]


def called(name: str) -> str:
    """What messages, logs and checkpoints call the loss ``name``: of FILE.py:NAME the NAME."""
    return name.rpartition(":")[2] if is_own(name) else name
