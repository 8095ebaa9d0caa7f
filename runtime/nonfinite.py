"""A loss that is not finite: detected without waiting for the device, saved for inspection, or skipped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import RunStopped, UserError
from runtime.state import random_state, save_json
from runtime.store import save_checkpoint

NONFINITE = "nonfinite"
LENGTH = "longest student output"
POLICIES = ("stop", "skip")


class Snapshot:
    """Copies of all tensors of modules, kept in the device's memory."""

    def __init__(self, modules: Mapping[str, Any]) -> None:
        self.modules = {name: module for name, module in modules.items() if isinstance(module, nn.Module)}
        self.copies: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def take(self) -> None:
        """Save the current values."""
        for name, module in self.modules.items():
            state, copies = module.state_dict(), self.copies.setdefault(name, {})
            if {k: v.shape for k, v in copies.items()} != {k: v.shape for k, v in state.items()}:
                self.copies[name] = {key: value.clone() for key, value in state.items()}
            else:
                copy_all(list(copies.values()), list(state.values()))

    @torch.no_grad()
    def give_back(self) -> None:
        """Restore the saved values."""
        for name, module in self.modules.items():
            copy_all(list(module.state_dict().values()), list(self.copies[name].values()))


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source to its target, with one kernel per dtype."""
    for dtype in {x.dtype for x in sources}:
        pairs = [(a, b) for a, b in zip(targets, sources, strict=True) if b.dtype == dtype]
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))


class FiniteAlarm:
    """Checks the loss of every step: :meth:`begin`, forward pass, :meth:`watch`, and then one of two.

    To stop a run, :meth:`problem` reads the loss one step late, when it is already on the host. To skip steps,
    :meth:`bad_step` reads it before the update, with the gradients, and :meth:`undo` restores the modules.

    Either way ``nonfinite.json`` (``rankN.nonfinite.json`` on other ranks) names the images of the last such step,
    and ``nonfinite.pth`` holds the state before it: every module's tensors, the views, the random state.
    """

    def __init__(self, folder: Path, rank: int, modules: Mapping[str, Any], limit: int = 10) -> None:
        """``limit``: steps in a row that may be skipped."""
        self.limit = limit
        self.path = folder / f"{f'rank{rank}.' if rank else ''}{NONFINITE}.json"
        self.snapshot = Snapshot(modules)
        self.began: dict[str, Any] = {}
        self.names: list[str] = []
        self.values: Tensor | None = None
        self.ready: torch.cuda.Event | None = None
        self.teacher: Tensor | None = None

    def begin(self, batch: Any, epoch: int, step: int) -> None:
        """Before the forward pass of a step."""
        self.snapshot.take()
        self.began = {"epoch": epoch, "step": step, "random": random_state(), "views": tuple(batch.views),
                      "indices": batch.indices}

    def watch(self, parts: Mapping[str, Tensor]) -> None:
        """After the forward pass: start an asynchronous copy of its scalars to the host."""
        scalars = {name: value.detach().float() for name, value in parts.items() if value.ndim == 0}
        if "student" in parts:  # a loss that uses only directions stays finite when lengths are not
            scalars[LENGTH] = torch.linalg.vector_norm(parts["student"].detach().float(), dim=1).max()
        self.teacher = parts.get("teacher")
        self.names, values = list(scalars), torch.stack(list(scalars.values()))
        self.values = values.to("cpu", non_blocking=values.is_cuda)
        if values.is_cuda:
            self.ready = torch.cuda.Event()
            self.ready.record()

    def problem(self) -> RunStopped | None:
        """The message if the last watched step was not finite; the state before it is saved."""
        parts = self._read()
        if parts is None or not _broken(parts):
            return None
        return RunStopped(f"{self._describe(parts)}, and the last checkpoint is untouched: {self._advice()}",
                          every_process=False)

    def bad_step(self, gradients: Iterable[Tensor]) -> str:
        """Before the update: what is wrong with the last watched step, '' for nothing. The host waits for it.

        ``gradients`` are checked besides the loss; with a gradient scaler, which handles them itself, give none.
        """
        gradients = list(gradients)
        largest = torch._foreach_norm(gradients, math.inf) if gradients else []
        finite = bool(torch.stack(largest).isfinite().all()) if largest else True
        parts = self._read()
        return "" if finite and not _broken(parts) else self._describe(parts)

    def undo(self) -> None:
        """Restore the modules to their state before the step."""
        self.snapshot.give_back()

    def refuse_row(self, row: int) -> None:
        """Raise :class:`RunStopped` if ``row`` steps in a row are too many."""
        if row > self.limit:
            raise RunStopped(f"{row} steps in a row were not finite, more than --nonfinite-limit {self.limit}; the "
                             f"last one's images are in {self.path}, and the last checkpoint is untouched: "
                             f"{self._advice(skips=True)}")

    def _advice(self, skips: bool = False) -> str:
        if self.teacher is not None and not torch.isfinite(self.teacher).all():
            return ("the teacher's features are not finite, so check its file with inspect_checkpoint.py, and use "
                    "--amp bf16 or off if it is valid")
        return "lower --lr, or use --amp bf16 or off" + ("" if skips else ", or skip such steps with --on-nonfinite "
                                                                          "skip")

    def _read(self) -> dict[str, float] | None:
        if self.values is None:
            return None
        if self.ready is not None:
            self.ready.synchronize()
        values, self.values, self.ready = self.values.tolist(), None, None
        return dict(zip(self.names, values, strict=True))

    def _describe(self, parts: Mapping[str, float]) -> str:
        """A sentence on the step; the state before it is saved."""
        began = {**self.began, "indices": self.began["indices"].tolist()}
        place = {"epoch": began["epoch"] + 1, "step": began["step"] + 1}  # as in the log
        said = ", ".join(f"{name} {value:.6g}" for name, value in parts.items())
        text = (f"the {_broken(parts) or 'gradient'} is not finite at epoch {place['epoch']}, step {place['step']} "
                f"({said}); ")
        try:
            save_json({**place, "parts": {k: str(v) for k, v in parts.items()}, "indices": began["indices"]}, self.path)
            save_checkpoint({**began, **self.snapshot.copies}, self.path.with_suffix(".pth"))
        except UserError:  # a full disk must not hide what happened
            return text + f"{self.path} could not be written"
        return text + f"its images are in {self.path} and the state before it in {self.path.with_suffix('.pth').name}"


def _broken(parts: Mapping[str, float]) -> str:
    """Which of the checked scalars is not finite; '' for none."""
    return next((name for name in ("loss", LENGTH) if not math.isfinite(parts.get(name, 0.0))), "")
