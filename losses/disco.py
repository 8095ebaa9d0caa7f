"""DisCo: MoCo v2 for the student, whose outputs are also pulled towards the teacher's.

Gao et al., "DisCo: Remedying Self-supervised Learning on Lightweight Models with Distilled Contrastive Learning",
ECCV 2022, arXiv 2104.09124. With unit outputs s and t of both heads for two views x1, x2:

    L = L_MoCo(s(x1), momentum(x2)) + w mean_i (|t_i(x1) - s_i(x1)|^2 + |t_i(x2) - s_i(x2)|^2)

The original sums the squares over a process's batch, so that the weight of the teacher falls as GPUs are added. Here it
is a mean with a weight, 32 by default: what that sum comes to at its 256 images on 8 GPUs, whatever the number of GPUs.
``summed`` is the original's sum. Its teacher runs in training mode; ours does only with --teacher-bn train.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from losses.base import Inputs, Loss, Needs, QueueSize, Recipe, StudentTemperature
from losses.queue import Queue, info_nce, unit_rows
from runtime.settings import Setting


class DisCo(Loss):
    """Two views; the teacher with its own head, the student with Linear(d, 2048), ReLU, Linear(2048, ``dim``)."""

    needs = Needs(views=2, teacher="head", head="wide", momentum=True, passes=2, gathers=True, also="queue")
    recipe = Recipe(epochs=200, lr=0.03, flags=("--teacher-bn", "train"), note="200 epochs x 2 views", published={
        "resnet18": "60.60 / 83.70 / 52.03", "resnet34": "62.50 / 85.40 / 53.65",
        "efficientnet_b0": "66.50 / 87.60 / 54.78"})

    def __init__(self, dim: int = 128, queue_size: QueueSize = 65536, s_temp: StudentTemperature = 0.2,
                 disco_weight: Annotated[float, Setting(
                     "weight of the mean squared distance; default {default}, which the original's sum over a "
                     "process's batch amounts to at its 256 images on 8 GPUs", least=0, metavar="W")] = 32.0,
                 disco_sum: Annotated[bool, Setting(
                     "the original's sum over a process's batch instead of the weighted mean: weaker the more GPUs "
                     "there are", excludes="disco_weight")] = False) -> None:
        super().__init__()
        self.queue, self.s_temp = Queue(queue_size, dim), s_temp
        self.weight, self.summed = disco_weight, disco_sum

    @property
    def per_process(self) -> bool:
        return self.summed

    def inputs(self, views: Sequence[Tensor], teachers: Sequence[Tensor]) -> Inputs:
        """Student and teacher see both views, the moving average the second."""
        return Inputs(views, teachers, views[1:])

    def forward(self, *, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], momentum: Tensor,
                ) -> dict[str, Tensor]:
        """Outputs [b, dim] for both views, and the moving average's for the second.

        Returns ``loss``, and before weighting ``moco``, its ``accuracy`` and ``distance``, the mean of the squares.
        """
        with torch.autocast(momentum.device.type, enabled=False):
            (s1, s2), (t1, t2), (k,) = unit_rows(*student), unit_rows(*teacher), unit_rows(momentum)
            moco, accuracy = info_nce(s1, k, self.queue.similarities(s1), self.s_temp)
            rows = (t1 - s1).square().sum(1) + (t2 - s2).square().sum(1)        # [b]
            drawn = rows.sum() if self.summed else self.weight * rows.mean()
            self.queue.put(k)
        return {"loss": moco + drawn, "moco": moco, "accuracy": accuracy, "distance": rows.mean()}
