"""CoSS: cosine similarity of each row plus *space similarity*, the cosine of each column.

Singh and Wang, "Simple Unsupervised Knowledge Distillation With Space Similarity", ECCV 2024,
arXiv 2409.13939, section 3:

    dot(t, s) = - sum_j (t_ij / |t_i|) (s_ij / |s_i|) / (T_t T_s)          for each row i
    L = l_0 mean_i dot(t, s) + l_1 mean_j dot(t^T, s^T)

CentredCoSS is ours, not the paper's: the batch's mean is first subtracted from each dimension of t and s. Pooled
features follow a ReLU and share a large common part, which a student with any weights has too; centred, the rows
tell images apart from the first step on, and the space term is a correlation. docs/RESULTS.md has both.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from losses.base import (
    EPS,
    Loss,
    RowWeight,
    SpaceBatch,
    SpaceWeight,
    StudentTemperature,
    TeacherTemperature,
    full_precision,
)
from runtime.collectives import BatchStatistics


class CoSS(Loss):
    """The CoSS loss. The temperatures are a pure scale: 1 / (0.1 * 0.07) is about 143.

    ``space_batch``: the batch over which both means and the space term are computed: ``local``, this process's, as in
    the original, or ``global``, that of all processes, so that loss and gradients equal those of a single process.
    """

    centred = False
    follows_rows = True
    neighbour_batches = True
    recipe = replace(Loss.recipe, published={"resnet18": "62.35 / 84.81 / 53.78", "resnet34": "64.01 / 86.14 / 54.80",
                                             "efficientnet_b0": "67.36 / 87.75 / 58.33"},
                     note="25 epochs x 16 images")

    def __init__(self, l_0: RowWeight = 1.0, l_1: SpaceWeight = 1.0, s_temp: StudentTemperature = 0.1,
                 t_temp: TeacherTemperature = 0.07, space_batch: SpaceBatch = "local") -> None:
        super().__init__()
        self.l_0, self.l_1, self.scale = l_0, l_1, 1.0 / (s_temp * t_temp)
        self.batch = BatchStatistics(space_batch)

    def forward(self, *, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """``student``, ``teacher``: features [b, d], of one width. Half precision is computed in float32.

        Returns scalars: ``loss``, and before weighting ``row`` and ``space``, each in [-scale, scale].
        """
        with torch.autocast(student.device.type, enabled=False):
            s, t = full_precision(student), full_precision(teacher)
            if self.centred:
                s, t = (x - mean for x, mean in zip((s, t), self.batch.means(s, t), strict=True))
            ts, tt, ss = t * s, t * t, s * s                                           # [b, d]
            row = cosine(ts.sum(1), tt.sum(1), ss.sum(1))                              # [b]
            ts, tt, ss, total, count = self.batch.sums(ts, tt, ss, row, torch.ones_like(row))
            row = -self.scale * total / count                                          # []
            space = -self.scale * cosine(ts, tt, ss).mean()                            # [d] -> []
            return {"loss": self.l_0 * row + self.l_1 * space, "row": row, "space": space}


class CentredCoSS(CoSS):
    """CoSS on features minus the mean of the batch that ``space_batch`` names."""

    centred = True
    follows_rows = False  # of centred ones
    recipe = Loss.recipe


def cosine(ts: Tensor, tt: Tensor, ss: Tensor) -> Tensor:
    """The cosine of vectors from their products t.s, t.t and s.s; lengths are at least 1e-12, as in F.normalize.

    If s is shorter than that, the gradient is zero. F.normalize would multiply it by 1e12: a feature that is dead in
    the whole batch would overflow half precision, although the cosine of a zero vector has no slope to follow.
    """
    found = ts / (tt.clamp_min(EPS**2).sqrt() * ss.clamp_min(EPS**2).sqrt())
    return torch.where(ss > EPS**2, found, found.detach())
