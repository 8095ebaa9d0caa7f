"""The user's own loss, FILE.py:NAME: it must follow the contract of losses/base.py, and is tried out before the run."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from losses.base import Loss, Needs
from runtime.own import Own, load_own

CONTRACT = "follow the contract in losses/base.py, as examples/my_loss.py does"
ROWS = 4


def own_loss(text: str) -> tuple[Own, type[Loss]]:
    """The code and the class that ``text`` names. Raises :class:`UserError` if it is not a subclass of Loss."""
    own = load_own(text, "--loss")
    if not (isinstance(own.value, type) and issubclass(own.value, Loss)):
        raise own.error("is not a subclass of losses.base.Loss", CONTRACT)
    needs = own.value.needs
    if not isinstance(needs, Needs) or needs.teacher not in (None, "features", "head"):
        raise own.error(f"has needs = {needs!r}, expected losses.base.Needs(...) with teacher None, features or head",
                        CONTRACT)
    return own, own.value


def try_out(own: Own, loss: Loss, dim: int | None, student_dim: int | None) -> None:
    """Compute one step on random outputs. Raises :class:`UserError` if that fails or the result is not as it should be.

    This uses a copy, so that the loss, its queues and the random state stay unchanged.
    """
    needs, width = loss.needs, dim or 8
    widths = {"student": (student_dim or width) if needs.head == "none" else width, "teacher": width}
    widths["momentum"] = widths["student"]
    with torch.random.fork_rng(devices=[]), own.blamed(f"on {ROWS} rows of {widths['student']} and {width} numbers"):
        loss = copy.deepcopy(loss)
        views = [torch.zeros(ROWS, 3, 8, 8, dtype=torch.uint8) for _ in range(needs.views)]
        asked = loss.inputs(views, views)
        keywords: dict[str, Any] = dict(asked.context)
        for role in widths:
            outputs = tuple(torch.randn(len(x), widths[role], requires_grad=role == "student")
                            for x in getattr(asked, role))
            keywords |= {role: outputs[0] if len(outputs) == 1 else outputs} if outputs else {}
        parts = loss(**keywords)
        if not (isinstance(parts, dict) and "loss" in parts and all(isinstance(x, Tensor) for x in parts.values())):
            raise own.error(f"returns a {type(parts).__name__}, expected a dict of scalars with 'loss' among them",
                            CONTRACT)
        total = parts["loss"]
        if total.ndim or not total.isfinite() or not total.requires_grad:
            raise own.error(f"returns the loss {total.detach()} (shape {list(total.shape)}"
                            f"{', without gradient' * (not total.requires_grad)}), expected one finite number that "
                            "depends on the student", CONTRACT)
        total.backward()
