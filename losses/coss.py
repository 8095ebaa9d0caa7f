"""CoSS: cosine similarity of each row plus *space similarity*, the cosine of each column.

Singh and Wang, "Simple Unsupervised Knowledge Distillation With Space Similarity", ECCV 2024,
arXiv 2409.13939, section 3:

    dot(t, s) = - sum_j (t_ij / |t_i|) (s_ij / |s_i|) / (T_t T_s)          for each row i
    L = l_0 mean_i dot(t, s) + l_1 mean_j dot(t^T, s^T)
"""

from __future__ import annotations

import torch
from torch import Tensor

from losses.base import Loss, full_precision, unit


class CoSS(Loss):
    """The CoSS loss. The temperatures are a pure scale: 1 / (0.1 * 0.07) is about 143.

    The space term's batch is this process's batch, as in the original.
    """

    def __init__(self, l_0: float = 1.0, l_1: float = 1.0, s_temp: float = 0.1, t_temp: float = 0.07) -> None:
        super().__init__()
        self.l_0, self.l_1, self.scale = l_0, l_1, 1.0 / (s_temp * t_temp)

    def forward(self, *, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """``student``, ``teacher``: features [b, d], of one width. Half precision is computed in float32.

        Returns scalars: ``loss``, and before weighting ``row`` and ``space``, each in [-scale, scale].
        """
        with torch.autocast(student.device.type, enabled=False):
            s, t = full_precision(student), full_precision(teacher)
            row = -self.scale * (unit(t, 1) * unit(s, 1)).sum(1).mean()      # [b, d] -> [b] -> []
            space = -self.scale * (unit(t, 0) * unit(s, 0)).sum(0).mean()    # [b, d] -> [d] -> []
            return {"loss": self.l_0 * row + self.l_1 * space, "row": row, "space": space}
