"""MoCo v2: the student alone, without a teacher.

He et al., CVPR 2020, algorithm 1; Chen et al., "Improved Baselines with Momentum Contrastive Learning", arXiv
2003.04297. With q of the student for one view, k of its moving average for the other, unit rows, and a queue Q of k:

    L = - mean_i log(exp(q.k / T) / (exp(q.k / T) + sum_j exp(q.Q_j / T)))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from losses.base import Inputs, Loss, Needs, QueueSize, Recipe, StudentTemperature
from losses.queue import Queue, info_nce, unit_rows


class MoCo(Loss):
    """Two views, no teacher: what a small network learns by itself, the baseline of every table."""

    needs = Needs(views=2, teacher=None, head="mlp", momentum=True, gathers=True, also="queue")
    recipe = Recipe(epochs=200, lr=0.03, flags=("--moco-dim", "128"), note="no teacher", published={
        "resnet18": "52.20 / 76.60 / 36.70", "resnet34": "56.80 / 81.40 / 41.50",
        "efficientnet_b0": "42.20 / 68.50 / 30.0"})

    def __init__(self, dim: int = 128, queue_size: QueueSize = 65536, s_temp: StudentTemperature = 0.2) -> None:
        super().__init__()
        self.queue, self.s_temp = Queue(queue_size, dim), s_temp

    def inputs(self, views: Sequence[Tensor], teachers: Sequence[Tensor]) -> Inputs:
        """The student sees the first view, its moving average the second."""
        return Inputs(views[:1], momentum=views[1:])

    def forward(self, *, student: Tensor, momentum: Tensor) -> dict[str, Tensor]:
        """Outputs [b, dim] for either view. Returns ``loss`` and ``accuracy``, of the positive against the queue."""
        with torch.autocast(student.device.type, enabled=False):
            q, k = unit_rows(student, momentum)
            loss, accuracy = info_nce(q, k, self.queue.similarities(q), self.s_temp)
            self.queue.put(k)
        return {"loss": loss, "accuracy": accuracy}
