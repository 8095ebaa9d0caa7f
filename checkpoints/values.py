"""Checks that the values of a checkpoint's tensors can belong to a trained network."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from runtime.errors import UserError

CLOSE = 2 ** -7  # tolerance for rotary positions, because some files hold them in bfloat16


class Unsound(UserError):
    """A checkpoint with tensors that no working network has."""


def refuse_unsound(tensors: Mapping[str, Tensor], whose: str) -> None:
    """Raise :class:`Unsound`, which begins with ``whose``, for the first tensor of a head that has :func:`trouble`."""
    for name, value in tensors.items():
        wanted = torch.int64 if name.endswith("num_batches_tracked") else torch.float32
        if found := trouble(name, value, wanted):
            raise Unsound(sentence(whose, name, found))


def sentence(whose: str, name: str, found: str) -> str:
    """The message about the tensor ``name``, whose fault is ``found``."""
    return (f"{whose}: {name} {found}; its training went wrong or the file was changed, so give another checkpoint of "
            "this network")


def trouble(name: str, value: Tensor, wanted: torch.dtype) -> str | None:
    """What is wrong with ``value`` for the tensor ``name`` of dtype ``wanted``, as the end of a sentence; None if
    nothing is.

    A weight of two or more dimensions must not be all zero, because it would pass nothing on. That of a batch norm may,
    because residual branches are initialised so. For counters only the type is checked.
    """
    if not wanted.is_floating_point:
        return f"is {_kind(value)}, expected whole numbers" if value.dtype.is_complex or value.is_quantized else None
    if not value.dtype.is_floating_point:
        return f"is {_kind(value)}, expected floating-point numbers"
    cast = value.to(wanted)
    broken = int((~torch.isfinite(cast)).sum())
    if broken:
        beyond = bool(torch.isfinite(value.double()).all())
        what = f"numbers beyond {_kind(cast)}" if beyond else "NaN or infinite numbers"
        return f"holds {broken:,} {what} among its {value.numel():,}"
    if name.endswith("running_var") and bool((cast < 0).any()):
        return f"holds {int((cast < 0).sum()):,} negative numbers, but is a variance"
    if name.endswith("weight") and value.ndim > 1 and value.numel() and not bool(cast.any()):
        return f"is all zero ({list(value.shape)})"
    return None


def other_rotation(name: str, value: Tensor, backbone: nn.Module) -> str | None:
    """How ``value`` differs from the rotary positions that timm's network ``backbone`` computes instead of reading, as
    the end of a sentence; None if it does not, or if tensor ``name`` does not hold rotary positions.

    DINOv3's files hold the periods [d / 4] of a head of width d, EVA-02's cosines and sines [s s, d] of s x s patches.
    """
    rope, kind = getattr(backbone, "rope", None), name.rpartition(".")[2]
    if kind == "periods" and hasattr(rope, "periods"):
        ours = rope.periods
    elif kind in ("freqs_cos", "freqs_sin") and hasattr(rope, "update_feat_shape") and value.ndim == 2:
        rope = copy.deepcopy(rope)
        rope.update_feat_shape([math.isqrt(len(value))] * 2)
        ours = rope.get_embed().chunk(2, dim=-1)[kind == "freqs_cos"]
    else:
        return None
    if value.shape == ours.shape and torch.allclose(value.float(), ours.float().to(value.device), CLOSE, CLOSE):
        return None
    return f"holds other rotary positions than {backbone.spec.arch} computes, so its features would differ"


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
