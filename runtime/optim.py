"""Learning-rate schedule, mixed precision and the update itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from runtime.errors import UserError
from runtime.micro_batches import MicroBatches

ACCUMULATED = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}}  # of a parameter, by optimizer; of others momentum_buffer
HOLD_EPOCHS = 5  # the original's "warm-up": it never ramps, it holds the base rate


def learning_rate(epoch: int, step: int, steps: int, *, base: float, epochs: int, warmup: int | None = None,
                  cosine: bool = True, milestones: Sequence[int] = ()) -> float:
    """The rate at ``step`` (from 0) of the ``steps`` of ``epoch`` (from 0).

    ``warmup=None`` is the original: the base rate for 5 epochs, then the curve. With ``warmup=n`` the rate
    climbs linearly over the steps of n epochs, reaching the base rate at the last, and then follows the curve.
    The curve is half a cosine over ``epochs``, one value an epoch, or a tenth at each of ``milestones``.
    """
    if warmup is None and epoch < HOLD_EPOCHS:
        return base
    if warmup is not None and epoch < warmup:
        return base * (epoch * steps + step + 1) / (warmup * steps)
    if cosine:
        return base * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    return base * 0.1 ** sum(epoch >= milestone for milestone in milestones)


def precision(amp: str, device: torch.device) -> str:
    """--amp with ``auto`` resolved: fp16 on a GPU, as in the original, and off on a CPU, where bf16 may be several
    times as fast, but small networks without batch norm learnt less in it (docs/results/SPEED.md)."""
    if amp == "auto":
        return "fp16" if device.type == "cuda" else "off"
    if amp == "fp16" and device.type != "cuda":
        raise UserError(f"--amp fp16 needs a CUDA GPU and this run is on {device.type}; use --amp bf16 or off")
    return amp


class Updater:
    """One optimisation step in the chosen precision; options that are off are no-ops, so that one loop serves all.

    ``amp``: ``off``, ``fp16`` (with a gradient scaler that lives as long as the run), ``bf16``, or ``auto``, resolved
    by :func:`precision`. ``clip``: the maximum norm of all gradients together, 0 for none. ``after``: called after
    each update, for example to update a moving average.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, amp: str = "off", clip: float = 0.0,
                 after: Callable[[], None] | None = None) -> None:
        self.optimizer, self.device_type, self.clip, self.after = optimizer, device.type, clip, after
        self.amp = precision(amp, device)
        self.dtype = {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}[self.amp]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == "fp16")
        self.passes: MicroBatches | None = None

    @property
    def decided(self) -> dict[str, str]:
        """What config.json records of it."""
        return {"precision": self.amp}

    def autocast(self) -> AbstractContextManager[Any]:
        """The context for forward passes."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None)

    def in_micro_batches(self, model: nn.Module, size: int) -> Callable[..., Any]:
        """``model`` itself, or with a ``size``, ``model`` called on parts of a batch (MicroBatches)."""
        self.passes = MicroBatches(model, size, self.autocast) if size else None
        return self.passes or model

    def step(self, loss: torch.Tensor, rate: float) -> None:
        """Backward, update at learning rate ``rate`` (times a group's own ``lr_scale``), and clear the gradients.

        Nothing here waits for the GPU, except a gradient scaler with an optimizer that is not fused.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.scaler.scale(loss).backward()
        if self.passes:
            self.passes.backward()
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.after:
            self.after()

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and scaler."""
        return {"kind": type(self.optimizer).__name__, "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`: loads accumulated state. Options (decay, momentum) stay this run's."""
        mine, theirs, kind = self.optimizer.state_dict(), state["optimizer"], state["kind"]
        if kind != type(self.optimizer).__name__:
            raise ValueError(f"it was trained by {kind} and --optimizer is {type(self.optimizer).__name__}")
        if [x["params"] for x in mine["param_groups"]] != [x["params"] for x in theirs["param_groups"]]:
            raise ValueError("its parameters are grouped in another way")
        self._check(theirs["state"])
        self.optimizer.load_state_dict({"state": theirs["state"], "param_groups": mine["param_groups"]})
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():  # fused kernels need the memory format of the weights
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def _check(self, state: dict[int, dict[str, Any]]) -> None:
        """Raise ValueError unless the accumulated state fits each parameter: fused kernels do not check shape and
        dtype."""
        parameters = dict(enumerate(p for group in self.optimizer.param_groups for p in group["params"]))
        names = ACCUMULATED.get(type(self.optimizer).__name__, {"momentum_buffer"})
        for index, values in state.items():
            if index not in parameters or set(values) - names:
                raise ValueError(f"its optimizer has {sorted(map(str, values))} of parameter {index}")
            for name, value in values.items():
                parameter = parameters[index]
                shape, dtype = ((), torch.float32) if name == "step" else (parameter.shape, parameter.dtype)
                if value is not None and (not isinstance(value, torch.Tensor) or value.shape != shape
                                          or value.dtype != dtype or value.layout != torch.strided):
                    found = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
                    raise ValueError(f"its {name} of parameter {index} is {found[:80]} and should be "
                                     f"{str(dtype).removeprefix('torch.')} {list(shape)}")
