"""Learning-rate schedule, mixed precision and the update itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from runtime.errors import UserError

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
    """--amp with ``auto`` decided: fp16 on a card, as in the original, off on a CPU."""
    if amp == "auto":
        return "fp16" if device.type == "cuda" else "off"
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a card and this run is on a CPU; use --amp bf16 or off")
    return amp


class Updater:
    """One optimisation step in the chosen precision; what is off is a no-op, so that one loop serves all.

    ``amp``: ``off``, ``fp16`` (with a gradient scaler that lives as long as the run) or ``bf16``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, amp: str = "off") -> None:
        self.optimizer, self.device_type = optimizer, device.type
        self.dtype = {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}[amp]
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def autocast(self) -> AbstractContextManager[Any]:
        """The context for forward passes."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None)

    def step(self, loss: torch.Tensor, rate: float) -> None:
        """Backward, update at learning rate ``rate`` (times a group's own ``lr_scale``), and clear the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and scaler."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
