"""DIST: Pearson correlation of the student's and the teacher's features read as distributions, by row and by column.

Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, on pooled features as in the CoSS
paper's code (which takes the column term over softmaxes of the transposes):

    L = l_0 mean_i (1 - rho(p_i, q_i)) + l_1 mean_j (1 - rho(p'_j, q'_j))
    p = softmax(s / T_s), q = softmax(t / T_t), p' = softmax(s^T / T_s), q' = softmax(t^T / T_t)

Two faults of the originals are not repeated. The CoSS code swaps the student's and the teacher's features,
so that each is divided by the other's temperature. And 1e-8 was added to the product of the two norms, which is not
small compared with those of distributions over thousands of dimensions; here the quotient is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losses.base import (
    Loss,
    RowWeight,
    SpaceBatch,
    SpaceWeight,
    StudentTemperature,
    TeacherTemperature,
    full_precision,
)
from runtime.collectives import BatchStatistics


class DIST(Loss):
    """The DIST loss. ``space_batch``: the column term is over this process's batch (``local``, as the original) or over
    that of all processes (``global``).
    """

    def __init__(self, l_0: RowWeight = 1.0, l_1: SpaceWeight = 1.0, s_temp: StudentTemperature = 0.1,
                 t_temp: TeacherTemperature = 0.07, space_batch: SpaceBatch = "local") -> None:
        super().__init__()
        self.l_0, self.l_1, self.s_temp, self.t_temp = l_0, l_1, s_temp, t_temp
        self.batch, self.alone = BatchStatistics(space_batch), BatchStatistics("local")

    def forward(self, *, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """``student``, ``teacher``: features [b, d], of one width. Half precision is computed in float32.

        Returns scalars: ``loss``, and before weighting ``row`` and ``space``, each in [0, 2].
        """
        with torch.autocast(student.device.type, enabled=False):
            s, t = full_precision(student) / self.s_temp, full_precision(teacher) / self.t_temp
            row, = self.batch.means(1 - correlation(s.T, t.T, self.alone))      # [b, d] -> [b] -> []
            space = 1 - correlation(s, t, self.batch).mean()                    # [b, d] -> [d] -> []
            return {"loss": self.l_0 * row + self.l_1 * space, "row": row, "space": space}


def correlation(s: Tensor, t: Tensor, batch: BatchStatistics) -> Tensor:
    """Of each column's softmax of ``s`` with that of ``t``, logits [n, m]: [m]. A softmax's divisor does not matter."""
    return pearson((s - batch.max(s)).exp(), (t - batch.max(t)).exp(), batch)


def pearson(x: Tensor, y: Tensor, batch: BatchStatistics) -> Tensor:
    """Correlation of each column of ``x`` with that of ``y``, [n, m] -> [m]; 0, without slope, if one is constant."""
    mean_x, mean_y, square_x, square_y = batch.means(x, y, x.detach().square(), y.detach().square())
    x, y = x - mean_x, y - mean_y
    product, power_x, power_y = batch.means(x * y, x.square(), y.square())
    rounding = (16 * torch.finfo(x.dtype).eps) ** 2
    varies = (power_x > rounding * square_x) & (power_y > rounding * square_y)
    return torch.where(varies, product, 0) * torch.where(varies, power_x * power_y, 1).rsqrt()
