"""SMD: pushes each image's hardest negative away and pulls its hardest positive closer, by how wrong each is.

Liu and Ye, "Improving Self-supervised Lightweight Model Learning via Hard-Aware Metric Distillation", ECCV 2022.
On unit rows, with the teacher's distances D_t[i,j] = |t_i - t_j| and the mixed D[i,j] = |t_i - s_j|, for image i:

    negatives   {j : D_t[i,j] > D[i,i]}; all others, i among them, are positives
    d_an        the least D of the negatives, at j = an;  d_ap the greatest D of the positives, at j = ap
    w_an, w_ap  max(0, D_t[i,an] - d_an), max(0, d_ap - D_t[i,ap]), without gradient
    L           cross-entropy of [w_an d_an, w_ap d_ap] / tau with label 0, averaged over i and over the two views;
                in the first two epochs also - mean_i <t_i, s_i>

tau is 0.04 for ResNets, 0.004 for EfficientNets and MobileNets (the paper's). With no negative w_an is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.base import Loss, Needs, Recipe, full_precision, unit
from runtime.collectives import SCOPES, gather_rows
from runtime.device import all_gather
from runtime.settings import Setting

WARM_EPOCHS = 2


class SMD(Loss):
    """The SMD loss. j runs over the images of all processes, so that the hardest does not depend on their number;
    with ``smd_batch`` "local" over each process's own, as in the original.
    """

    needs = Needs(views=2, head="linear", passes=2.0, gathers=True)
    recipe = Recipe(epochs=100, lr=0.1, batch=512, flags=("--smd-batch", "local"), small=("--smd-tau", "0.004"),
                    published={"resnet18": "59.56 / 83.29 / 49.69", "resnet34": "62.75 / 85.25 / 52.61"},
                    note="100 epochs x 2 views; lr 0.05 for each 256 images")

    def __init__(self, smd_tau: Annotated[float, Setting(
                     "temperature; default {default}, the paper's for ResNets (0.004 for EfficientNets and MobileNets)",
                     above=0, metavar="T")] = 0.04,
                 smd_batch: Annotated[str, Setting(
                     "where to look for the hardest images: in the batch of all processes (global, default) or, as in "
                     "the original, of each process (local), where more GPUs mean easier ones",
                     choices=SCOPES)] = "global") -> None:
        super().__init__()
        self.tau, self.local = smd_tau, smd_batch == "local"

    def forward(self, *, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> dict[str, Tensor]:
        """Features [b, d] of each view. Half precision is computed in float32.

        Returns scalars: ``loss``, ``metric`` (the cross-entropy) and ``cosine`` (minus the mean cosine of the rows).
        """
        with torch.autocast(student[0].device.type, enabled=False):
            views = [(unit(full_precision(t), 1), unit(full_precision(s), 1))
                     for t, s in zip(teacher, student, strict=True)]
            metric = sum(self._metric(t, s) for t, s in views) / len(views)
            cosine = sum(-(t * s).sum(1).mean() for t, s in views) / len(views)
            return {"loss": metric + cosine if self.epoch < WARM_EPOCHS else metric, "metric": metric, "cosine": cosine}

    def _metric(self, t: Tensor, s: Tensor) -> Tensor:
        """The cross-entropy of one view's unit rows [b, d]."""
        every_t, every_s = (t, s) if self.local else (all_gather(t), gather_rows(s))   # [B, d]
        an, ap, negative = hardest(t, s, every_t, every_s)
        d_an, d_ap = (distance(t, every_s[j]) for j in (an, ap))                                    # [b]
        w_an = (distance(t, every_t[an]) - d_an.detach()).relu() * negative
        w_ap = (d_ap.detach() - distance(t, every_t[ap])).relu()
        logits = torch.stack([w_an * d_an, w_ap * d_ap], dim=1) / self.tau
        return F.cross_entropy(logits, torch.zeros_like(an))


@torch.no_grad()
def hardest(t: Tensor, s: Tensor, every_t: Tensor, every_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of ``t``, ``s`` [b, d] the places in [0, B) of its hardest negative and positive, and whether it
    has a negative at all."""
    d_t, d = (torch.cdist(t, x, compute_mode="donot_use_mm_for_euclid_dist") for x in (every_t, every_s))  # [b, B]
    negative = d_t > distance(t, s)[:, None]
    an = d.masked_fill(~negative, torch.inf).argmin(1)
    return an, d.masked_fill(negative, -torch.inf).argmax(1), negative.any(1)


def distance(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean, of rows [b, d]: [b]."""
    return (x - y).norm(dim=1)
