"""The student's head, by name; and a pretrained network's own head, rebuilt from its tensors.

A pretrained head may be MoCo's MLP, SimSiam's projector, or a classifier. Its tensors have the names of an
``nn.Sequential`` (``0.weight``, ``2.weight`` ...) or of one layer (``weight``, ``bias``). Layers without tensors do not
appear in the file; in every public head of this kind they are ReLUs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

from torch import Tensor, nn

from runtime.errors import UserError
from runtime.settings import Setting

HeadNorm = Annotated[bool, Setting(
    "add batch norm after both layers of the head, as in SimCLR v2 and MoCo v3; default: no batch norm, as in MoCo v2 "
    "and the papers of all methods, but small networks and short trainings hardly learn without it", "--head-bn")]

WIDE = 2048  # width of the hidden layer in the code of CoSS, BINGO and DisCo


def mlp(width: int, hidden: int, out: int, batch_norm: bool = False) -> nn.Sequential:
    """Linear(width, hidden), ReLU, Linear(hidden, out), and with ``batch_norm`` batch norm after each linear layer."""
    layers = [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out),
              nn.BatchNorm1d(out, affine=False)]
    return nn.Sequential(*(x for x in layers if batch_norm or not isinstance(x, nn.BatchNorm1d)))


HEADS: dict[str, Callable[[int, int, bool], nn.Module]] = {  # (width of the trunk, of the output, batch norm) -> head
    "none": lambda d, out, bn: nn.Identity(),                                                       # CompRess
    "linear": lambda d, out, bn: nn.Linear(d, out),                                                 # SMD
    "projection": lambda d, out, bn: nn.Identity() if d == out else mlp(d, WIDE, out, bn),          # CoSS, section 4
    "mlp": lambda d, out, bn: mlp(d, d, out, bn),                                                   # MoCo v2, SEED
    "wide": lambda d, out, bn: mlp(d, WIDE, out, bn),                                               # BINGO, DisCo
}


def build_head(name: str, width: int, out: int, batch_norm: bool = False) -> nn.Module:
    """The student's head [b, width] -> [b, out], by a name of ``HEADS``; ``none`` keeps the width.

    ``batch_norm``: add batch norm after each layer of a head with two layers.
    """
    return HEADS[name](width, out, batch_norm)


class Heads(nn.ModuleDict):
    """Several heads on one trunk: [b, width] -> a tuple with [b, out] of each head."""

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return tuple(head(features) for head in self.values())


def build_heads(wanted: Sequence[tuple[str, str | None]], width: int, outs: Mapping[str | None, int],
                batch_norm: bool = False) -> nn.Module:
    """A head for each (name, target) in ``wanted``; ``outs`` gives the width of each target. Several are joined in
    :class:`Heads`."""
    heads = {f"{name}_{to or 'alone'}": build_head(name, width, outs[to], batch_norm) for name, to in wanted}
    return Heads(heads) if len(heads) > 1 else next(iter(heads.values()))


def head_from(tensors: Mapping[str, Tensor], whose: str) -> nn.Sequential:
    """The head [b, d_trunk] -> [b, d_head] with these ``tensors``, all of which it uses.

    It consists of linear layers with or without bias, batch norm with or without weights, and a ReLU for each missing
    number between two layers. Raises :class:`UserError`, beginning with ``whose``, for any other head, such as DINO's.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"(?:(\d+)\.)?(weight|bias|running_mean|running_var|num_batches_tracked)", name)
        if match is None:
            raise UserError(f"{whose} holds {name}, expected linear layers and batch norm; "
                            "choose a loss, or an export, that needs no head")
        layers.setdefault(int(match[1] or 0), {})[match[2]] = value
    if not layers:
        raise UserError(f"{whose} has no head; give the checkpoint of the pretraining, which has one, or choose a "
                        "loss, or an export, that needs no head")
    head = nn.Sequential()
    for number in range(min(layers), max(layers) + 1):
        head.append(_layer(layers[number], whose) if number in layers else nn.ReLU(inplace=True))
    state = {f"{place}.{name}": value for place, number in enumerate(range(min(layers), max(layers) + 1))
             for name, value in layers.get(number, {}).items()}
    wanted = head.state_dict()
    head.load_state_dict({**{k: v for k, v in wanted.items() if k.endswith(".num_batches_tracked")}, **state})
    return head


def width_of(head: nn.Module, width: int) -> int:
    """The output width of a head with input width ``width``."""
    return [width, *(layer.out_features for layer in head.modules() if isinstance(layer, nn.Linear))][-1]


def describe(head: nn.Sequential) -> str:
    """The layers of a head in words: ``Linear(512, 512), ReLU, Linear(512, 128)``."""
    return ", ".join(f"Linear({layer.in_features}, {layer.out_features})" if isinstance(layer, nn.Linear)
                     else type(layer).__name__ for layer in head)


def _layer(tensors: dict[str, Tensor], whose: str) -> nn.Module:
    weight = tensors.get("weight")
    if "running_mean" in tensors:
        return nn.BatchNorm1d(len(tensors["running_mean"]), affine=weight is not None)
    if weight is None or weight.ndim != 2:
        raise UserError(f"{whose} holds a layer of shape {list(weight.shape) if weight is not None else 'unknown'}, "
                        "expected a linear layer or batch norm; choose a loss, or an export, that needs no head")
    return nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors)
