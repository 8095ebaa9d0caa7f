"""The objectives by name, and sums of them.

A loss is a :class:`losses.base.Loss`: its ``needs`` say what it asks of the loop (views, a teacher's features or
head, a momentum student, pairs of neighbours), its ``inputs`` which images each network sees. It is called with
keyword arguments, ``student=`` and, if it asked for them, ``teacher=`` and ``momentum=``: a tensor [b, d] where the
network saw one batch of images, a tuple of tensors where it saw several (two views). It returns a dict of scalars:
``loss`` and its parts. The loop calls the :class:`losses.combine.Objective` that holds it; in a sum each loss has
its own student head unless two want the same one.

To add one: a file with the citation, the formula and the paper's recipe, and a line in ``LOSSES``. Constructor
arguments that carry a :class:`runtime.settings.Setting` become flags; a flag that is not given keeps the
method's own default.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from losses.base import CombinedNeeds, Loss
from losses.bingo import BINGO
from losses.combine import Objective, combined_needs
from losses.compress import CompRess
from losses.coss import CentredCoSS, CoSS
from losses.dino import DINO, DINOSS
from losses.disco import DisCo
from losses.dist import DIST
from losses.moco import MoCo
from losses.regression import MSE, Cosine
from losses.rkd import RKD
from losses.seed import SEED
from losses.smd import SMD
from runtime.errors import UserError
from runtime.settings import Declared, declared_among

LOSSES: dict[str, type[Loss]] = {
    "coss": CoSS, "coss_centred": CentredCoSS, "seed": SEED, "compress": CompRess, "bingo": BINGO, "disco": DisCo,
    "smd": SMD, "dist": DIST, "dino": DINO, "dinoss": DINOSS, "cosine": Cosine, "mse": MSE, "rkd": RKD, "moco": MoCo,
}


def build_loss(name: str, **options: Any) -> Loss:
    """The loss called ``name``, built with those of ``options`` that its constructor accepts and that are not None."""
    _known(name)
    defaults = {key: x.default for key, x in inspect.signature(LOSSES[name]).parameters.items()
                if x.kind is x.POSITIONAL_OR_KEYWORD}
    arguments = {key: default if options.get(key) is None else options[key] for key, default in defaults.items()}
    loss = LOSSES[name](**arguments)
    loss.settings = arguments
    return loss


def build_objective(names: str, weights: Sequence[float] | None = None, beta: float = 1.0,
                    widths: Mapping[str | None, int] | None = None, **options: Any) -> Objective:
    """``beta`` times the sum of the losses in ``names`` (``coss`` or ``coss+seed``), each with its weight (or 1).

    ``widths``: the width of the outputs given to a loss, by what they are compared with (``Needs.teacher``).
    """
    needs_of(names)
    return Objective({name: build_loss(name, dim=(widths or {}).get(LOSSES[name].needs.teacher), **options)
                      for name in names.split("+")}, weights, beta)


def needs_of(names: str) -> CombinedNeeds:
    """What the losses in ``names`` need together; raises :class:`UserError` if they cannot be combined."""
    split = names.split("+")
    for name in split:
        _known(name)
        if split.count(name) > 1:
            raise UserError(f"--loss {names} names {name} twice; name it once, with a weight in --loss-weights")
    return combined_needs({name: LOSSES[name].needs for name in split})


def settings(names: Iterable[str] = LOSSES) -> dict[str, dict[str, Declared]]:
    """The settings that these losses declare: {setting: {loss: its declaration, with its own default}}."""
    return declared_among({name: LOSSES[name] for name in names})


def _known(name: str) -> None:
    if name not in LOSSES:
        raise UserError(f"--loss {name} is unknown; choose from {', '.join(sorted(LOSSES))}, or a sum of them with +")
