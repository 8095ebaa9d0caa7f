"""Cross-entropy of the features read as distributions, in the manner of DINO; and the same over columns too.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, equation 2, with a frozen
teacher and therefore without centring; the two baselines `dino` and `dinoss` of the CoSS paper's code:

    CE(t, s) = - sum_j softmax(t / T_t)_ij log softmax(s / T_s)_ij          for each row i
    dino:    L = mean_i CE(t, s)
    dinoss:  L = mean_i CE(t, s) + 0.5 mean_j CE(t^T, s^T), weights that --l_0 and --l_1 do not change there either
"""

from __future__ import annotations

import torch
from torch import Tensor

from losses.base import Loss, SpaceBatch, StudentTemperature, TeacherTemperature, full_precision
from runtime.collectives import BatchStatistics


class DINO(Loss):
    """Each image's features as a distribution over the dimensions. They are not normalised, so their scale counts."""

    def __init__(self, s_temp: StudentTemperature = 0.1, t_temp: TeacherTemperature = 0.07) -> None:
        super().__init__()
        self.s_temp, self.t_temp = s_temp, t_temp

    def forward(self, *, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """``student``, ``teacher``: features [b, d], of one width. Half precision is computed in float32.

        Returns scalars: ``loss`` and ``entropy``, the teacher's, below which the loss cannot fall.
        """
        with torch.autocast(student.device.type, enabled=False):
            s, t = full_precision(student) / self.s_temp, full_precision(teacher) / self.t_temp
            return {"loss": by_row(t, s).mean(), "entropy": by_row(t, t).mean()}


class DINOSS(Loss):
    """DINO plus the same over columns: each dimension as a distribution over the images.

    ``space_batch``: over those of this process's batch (``local``, as the original) or of all processes' (``global``).
    """

    def __init__(self, s_temp: StudentTemperature = 0.1, t_temp: TeacherTemperature = 0.07,
                 space_batch: SpaceBatch = "local") -> None:
        super().__init__()
        self.s_temp, self.t_temp = s_temp, t_temp
        self.batch = BatchStatistics(space_batch)

    def forward(self, *, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """As :class:`DINO`'s. Returns scalars: ``loss``, and before weighting ``row`` and ``space``."""
        with torch.autocast(student.device.type, enabled=False):
            s, t = full_precision(student) / self.s_temp, full_precision(teacher) / self.t_temp
            row, space = self.batch.means(by_row(t, s))[0], by_column(t, s, self.batch).mean()
            return {"loss": row + 0.5 * space, "row": row, "space": space}


def by_row(t: Tensor, s: Tensor) -> Tensor:
    """Cross-entropy of softmax(t) against softmax(s), logits [b, d]: [b]."""
    return -(t.softmax(1) * s.log_softmax(1)).sum(1)


def by_column(t: Tensor, s: Tensor, batch: BatchStatistics) -> Tensor:
    """The same of the transposes, [d], out of sums over the batch's rows: log sum exp(s) - sum q s."""
    s, weights = s - batch.max(s), (t - batch.max(t)).exp()
    total_s, total_t, product = batch.sums(s.exp(), weights, weights * s)
    return total_s.log() - product / total_t
