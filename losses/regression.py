"""Regression of the teacher's features: by direction (`cosine`) or by value (`mse`).

The plainest distillation; Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, on pooled features of one
width:

    cosine:  L = mean_i (1 - <t_i, s_i> / (|t_i| |s_i|))          mse:  L = mean_ij (s_ij - t_ij)^2

The cosine is CoSS's row term without its temperatures; the squared error of unit features would be twice the same,
so `mse` takes the features as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losses.base import Loss, full_precision, unit


class Cosine(Loss):
    """One less the cosine of each row, averaged."""

    follows_rows = True

    def forward(self, *, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """``student``, ``teacher``: features [b, d], of one width. Half precision is computed in float32.

        Returns ``loss``, a scalar in [0, 2].
        """
        with torch.autocast(student.device.type, enabled=False):
            s, t = full_precision(student), full_precision(teacher)
            return {"loss": 1 - (unit(t, 1) * unit(s, 1)).sum(1).mean()}       # [b, d] -> [b] -> []


class MSE(Loss):
    """The squared difference of each number, averaged over rows and columns."""

    def forward(self, *, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """``student``, ``teacher``: features [b, d], of one width. Half precision is computed in float32.

        Returns ``loss``, a scalar of at least 0.
        """
        with torch.autocast(student.device.type, enabled=False):
            s, t = full_precision(student), full_precision(teacher)
            return {"loss": (s - t).square().mean()}                           # [b, d] -> []
