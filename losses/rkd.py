"""RKD: the student matches the teacher's distances of pairs and angles of triplets of images.

Park et al., "Relational Knowledge Distillation", CVPR 2019, section 3.2. Over all pairs and triplets of
different images of this process's batch, each averaged, with Huber's l of delta 1:

    L = w_D mean_ij l(|t_i - t_j| / mu_t, |s_i - s_j| / mu_s) + w_A mean_ijk l(cos(t_i, t_j, t_k), cos(s_i, s_j, s_k))

mu is the mean distance of the pairs and cos(x_i, x_j, x_k) the cosine of the angle at x_j. Weights 1 and 2, the
paper's where RKD is the only loss. The difference vectors are computed for a few x_j at a time, and again in the
backward pass: b^2 d numbers, as in the original, are 4 GB at 1,024 images of 1,024 features.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from losses.base import EPS, Loss, full_precision, unit, weights
from runtime.settings import Setting

CHUNK = 2**24  # numbers of one part's differences and cosines, 64 MiB in float32


def two_weights(text: str) -> list[float]:
    """``1,2`` as the weights of distances and angles; raises argparse.ArgumentTypeError."""
    found = weights(text)
    if len(found) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not two comma-separated weights, for distances and angles")
    return found


class RKD(Loss):
    """The distance-wise and the angle-wise loss together."""

    per_process = True

    def __init__(self, rkd_weights: Annotated[Sequence[float], Setting(
            "weights of the distance and angle terms; default {default}, the paper's where RKD is the only loss",
            parse=two_weights, metavar="W,W")] = (1.0, 2.0)) -> None:
        super().__init__()
        self.distance_weight, self.angle_weight = rkd_weights

    def forward(self, *, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """``student``, ``teacher``: features [b, d]. Half precision is computed in float32.

        Returns scalars: ``loss``, and before weighting ``distance`` and ``angle``.
        """
        with torch.autocast(student.device.type, enabled=False):
            s, t = full_precision(student), full_precision(teacher)
            b, parts = len(s), []
            for vertices in torch.arange(b, device=s.device).split(max(1, CHUNK // (b * (b + s.shape[1])))):
                parts.append(checkpoint(relations, s, t, vertices, use_reentrant=False, preserve_rng_state=False))
            d_s, d_t, angles = zip(*parts, strict=True)
            pairs, triplets = max(1, b * (b - 1)), max(1, b * (b - 1) * (b - 2) // 2)
            distance = huber(relative(torch.cat(d_s), pairs), relative(torch.cat(d_t), pairs)) / pairs
            angle = torch.stack(angles).sum() / triplets
            loss = self.distance_weight * distance + self.angle_weight * angle
            return {"loss": loss, "distance": distance, "angle": angle}


def relations(s: Tensor, t: Tensor, vertices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distances [c, b] of ``vertices`` [c] from all images, in both spaces, and the sum of l over the angles there."""
    distances, cosines = [], []
    for x in (s, t):
        difference = x - x[vertices, None]                     # [c, b, d]
        direction = unit(difference, 2)                        # zero where an image meets itself
        distances.append(difference.norm(dim=2))               # [c, b]
        cosines.append((direction @ direction.mT).tril(-1))    # [c, b, b]; each two images once
    return *distances, huber(*cosines)


def relative(distances: Tensor, pairs: int) -> Tensor:
    """Distances [b, b] over their mean."""
    return distances / (distances.sum() / pairs).clamp_min(EPS)


def huber(x: Tensor, y: Tensor) -> Tensor:
    """Sum of (x - y)^2 / 2 where that is below 1/2, and |x - y| - 1/2 elsewhere."""
    return F.smooth_l1_loss(x, y, reduction="sum")
