"""Cross-entropy of the features read as distributions, in the manner of DINO; and the same over columns too.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, equation 2, with a frozen
teacher and therefore without centring; the two baselines `dino` and `dinoss` of the CoSS paper's code:

    CE(t, s) = - sum_j softmax(t / T_t)_ij log softmax(s / T_s)_ij          for each row i
    dino:    L = mean_i CE(t, s)
    dinoss:  L = l_0 mean_i CE(t, s) + l_1 mean_j CE(t^T, s^T), by default 1 and 0.5
"""

from __future__ import annotations

import torch
from torch import Tensor

from losses.base import Loss, full_precision


class DINO(Loss):
    """Each image's features as a distribution over the dimensions. They are not normalised, so their scale counts."""

    def __init__(self, s_temp: float = 0.1, t_temp: float = 0.07) -> None:
        super().__init__()
        self.s_temp, self.t_temp = s_temp, t_temp

    def forward(self, *, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """``student``, ``teacher``: features [b, d], of one width. Half precision is computed in float32.

        Returns scalars: ``loss`` and ``entropy``, the teacher's, below which the loss cannot fall.
        """
        with torch.autocast(student.device.type, enabled=False):
            s, t = full_precision(student) / self.s_temp, full_precision(teacher) / self.t_temp
            return {"loss": cross_entropy(t, s), "entropy": cross_entropy(t, t).detach()}


class DINOSS(DINO):
    """With the same over the transposes: each dimension as a distribution over the images of this process's batch."""

    def __init__(self, l_0: float = 1.0, l_1: float = 0.5, s_temp: float = 0.1, t_temp: float = 0.07) -> None:
        super().__init__(s_temp, t_temp)
        self.l_0, self.l_1 = l_0, l_1

    def forward(self, *, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """As :class:`DINO`'s. Returns scalars: ``loss``, and before weighting ``row`` and ``space``."""
        with torch.autocast(student.device.type, enabled=False):
            s, t = full_precision(student) / self.s_temp, full_precision(teacher) / self.t_temp
            row, space = cross_entropy(t, s), cross_entropy(t.T, s.T)
            return {"loss": self.l_0 * row + self.l_1 * space, "row": row, "space": space}


def cross_entropy(t: Tensor, s: Tensor) -> Tensor:
    """Mean over rows of the cross-entropy of softmax(t) against softmax(s), logits [n, m]: a scalar."""
    return -(t.softmax(1) * s.log_softmax(1)).sum(1).mean()
