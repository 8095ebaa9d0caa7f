"""DIST: Pearson correlation of the student's and the teacher's features read as distributions, by row and by column.

Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, on pooled features as in
the CoSS paper's code (which takes the column term over softmaxes of the transposes):

    L = l_0 mean_i (1 - rho(p_i, q_i)) + l_1 mean_j (1 - rho(p'_j, q'_j))
    p = softmax(s / T_s), q = softmax(t / T_t), p' = softmax(s^T / T_s), q' = softmax(t^T / T_t)

Two faults of the originals are not repeated. The CoSS code hands the student's features over as the teacher's and the
other way round, so that each is divided by the other's temperature. And 1e-8 was added to the product of the two
norms, which is not small beside those of distributions over thousands of dimensions; here the quotient is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losses.base import Loss, full_precision


class DIST(Loss):
    """The DIST loss. Its column term's batch is this process's batch, as in the original."""

    def __init__(self, l_0: float = 1.0, l_1: float = 1.0, s_temp: float = 0.1, t_temp: float = 0.07) -> None:
        super().__init__()
        self.l_0, self.l_1, self.s_temp, self.t_temp = l_0, l_1, s_temp, t_temp

    def forward(self, *, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """``student``, ``teacher``: features [b, d], of one width. Half precision is computed in float32.

        Returns scalars: ``loss``, and before weighting ``row`` and ``space``, each in [0, 2].
        """
        with torch.autocast(student.device.type, enabled=False):
            s, t = full_precision(student) / self.s_temp, full_precision(teacher) / self.t_temp
            row = 1 - pearson(s.softmax(1), t.softmax(1)).mean()            # [b, d] -> [b] -> []
            space = 1 - pearson(s.T.softmax(1), t.T.softmax(1)).mean()      # [d, b] -> [d] -> []
            return {"loss": self.l_0 * row + self.l_1 * space, "row": row, "space": space}


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Correlation of each row of ``x`` with that of ``y``, [n, m] -> [n]; 0, without slope, where one is constant."""
    return (standardised(x) * standardised(y)).sum(1)


def standardised(x: Tensor) -> Tensor:
    """Rows of ``x`` centred and of length 1; of length 0 and without gradient where nothing but rounding is left."""
    centred = x - x.mean(1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    varies = length > 16 * torch.finfo(x.dtype).eps * x.norm(dim=1, keepdim=True)
    return torch.where(varies, centred, 0) / torch.where(varies, length, 1)
