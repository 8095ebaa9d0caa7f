"""The student's head, by name; and a pre-trained network's own head, rebuilt from its tensors.

The second is MoCo's MLP, SimSiam's projector, a classifier. Its names are those of an ``nn.Sequential``
(``0.weight``, ``2.weight`` ...) or of one layer (``weight``, ``bias``). What has no tensors is not in the file; in
every public head of this kind it is a ReLU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from runtime.errors import UserError

WIDE = 2048  # of the hidden layer, in the code of CoSS, BINGO and DisCo


def mlp(width: int, hidden: int, out: int, batch_norm: bool = False) -> nn.Sequential:
    """Linear(width, hidden), ReLU, Linear(hidden, out); with ``batch_norm`` one behind each linear layer."""
    layers = [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out),
              nn.BatchNorm1d(out, affine=False)]
    return nn.Sequential(*(x for x in layers if batch_norm or not isinstance(x, nn.BatchNorm1d)))


HEADS: dict[str, Callable[[int, int], nn.Module]] = {  # (width of the trunk, of what it is compared with) -> head
    "projection": lambda d, out: nn.Identity() if d == out else mlp(d, WIDE, out),  # CoSS, section 4
    "linear": nn.Linear,                                                            # SMD
    "mlp": lambda d, out: mlp(d, d, out),                                           # MoCo v2, SEED
    "wide": lambda d, out: mlp(d, WIDE, out),                                       # BINGO, DisCo
}


def build_head(name: str, width: int, out: int) -> nn.Module:
    """The student's head [b, width] -> [b, out], by a name of ``HEADS``."""
    return HEADS[name](width, out)


def head_from(tensors: Mapping[str, Tensor], whose: str) -> nn.Sequential:
    """The head [b, d_trunk] -> [b, d_head] that ``tensors`` fill, all of them.

    Linear layers with or without bias, batch norm with or without weights, and a ReLU at each number left out
    between two layers. Raises :class:`UserError`, beginning with ``whose``, for any other head (DINO's, for example).
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"(?:(\d+)\.)?(weight|bias|running_mean|running_var|num_batches_tracked)", name)
        if match is None:
            raise UserError(f"{whose} holds {name}, expected linear layers and batch norm in a row; "
                            "take a loss, or an export, without it")
        layers.setdefault(int(match[1] or 0), {})[match[2]] = value
    if not layers:
        raise UserError(f"{whose} has no head in it; take the file of the pre-training, or a loss, or an "
                        "export, that needs none")
    head = nn.Sequential()
    for number in range(min(layers), max(layers) + 1):
        head.append(_layer(layers[number], whose) if number in layers else nn.ReLU(inplace=True))
    state = {f"{place}.{name}": value for place, number in enumerate(range(min(layers), max(layers) + 1))
             for name, value in layers.get(number, {}).items()}
    wanted = head.state_dict()
    head.load_state_dict({**{k: v for k, v in wanted.items() if k.endswith(".num_batches_tracked")}, **state})
    return head


def width_of(head: nn.Sequential) -> int:
    """The width of a head's output."""
    return next(layer.out_features for layer in reversed(head) if isinstance(layer, nn.Linear))


def describe(head: nn.Sequential) -> str:
    """``Linear(512, 512), ReLU, Linear(512, 128)``."""
    return ", ".join(f"Linear({layer.in_features}, {layer.out_features})" if isinstance(layer, nn.Linear)
                     else type(layer).__name__ for layer in head)


def _layer(tensors: dict[str, Tensor], whose: str) -> nn.Module:
    weight = tensors.get("weight")
    if "running_mean" in tensors:
        return nn.BatchNorm1d(len(tensors["running_mean"]), affine=weight is not None)
    if weight is None or weight.ndim != 2:
        raise UserError(f"{whose} holds a layer of shape {list(weight.shape) if weight is not None else 'unknown'}, "
                        "expected a linear layer or batch norm; take a loss, or an export, without it")
    return nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors)
