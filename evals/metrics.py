"""Top-k accuracy with deterministic ties."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def places(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes rank before the true one: int64 [...] of logits [..., C] and labels int64 [...].

    Among equal logits the lower class number ranks first, as for argmax. A true class whose logit is NaN ranks last.
    """
    true = logits.gather(-1, labels[..., None])                                                       # [..., 1]
    lower = torch.arange(logits.shape[-1], device=logits.device) < labels[..., None]                  # [..., C]
    before = ((logits > true) | ((logits == true) & lower)).sum(-1)
    return torch.where(true[..., 0].isnan(), logits.shape[-1], before)


def of_one_class(classes: Sequence[str]) -> str:
    """The warning about scores if there is only one class to choose from, otherwise ''."""
    return f"all images are of one class ({classes[0]}), so these scores mean nothing" if len(classes) == 1 else ""


def accuracy(logits: Tensor, labels: Tensor, top: Sequence[int] = (1, 5)) -> list[float]:
    """Percent of rows [n, C] whose label int64 [n] is among the first k classes, for each k of ``top``."""
    where = torch.cat([places(part, truth.to(part.device)) for part, truth in
                       zip(logits.split(8192), labels.split(8192), strict=True)] or [labels])
    return [100 * float((where < k).double().mean()) if len(where) else float("nan") for k in top]
