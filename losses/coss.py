"""CoSS: cosine similarity of each row plus *space similarity*, the cosine of each column.

Singh and Wang, "Simple Unsupervised Knowledge Distillation With Space Similarity", ECCV 2024,
arXiv 2409.13939, section 3:

    dot(t, s) = - sum_j (t_ij / |t_i|) (s_ij / |s_i|) / (T_t T_s)          for each row i
    L = l_0 mean_i dot(t, s) + l_1 mean_j dot(t^T, s^T)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 1e-12  # F.normalize's, and so the original's


class CoSS(nn.Module):
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


def full_precision(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it already is."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor, dim: int) -> Tensor:
    """``x / max(|x|, 1e-12)`` along ``dim``, with gradient zero where the vector is shorter than that.

    F.normalize's gradient there is 1e12 times the incoming one: a feature that is dead in the whole batch
    would overflow half precision, although a cosine with nothing has no slope to follow.
    """
    norm = x.norm(dim=dim, keepdim=True)
    direction = x / norm.clamp_min(EPS)
    return torch.where(norm > EPS, direction, direction.detach())
