"""SEED: the student's similarities to a queue of teacher outputs follow the teacher's own.

Fang et al., "SEED: Self-supervised Distillation for Visual Representation", ICLR 2021, arXiv
2101.04731. With unit outputs z_s and z_t of both heads and a queue Q of z_t:

    p = softmax([z_t.z_t, z_t.Q] / T_t),  L = - mean_i sum_j p_ij log softmax([z_s.z_t, z_s.Q] / T_s)_ij

The original refuses a batch size that does not divide the queue; ours wraps around.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losses.base import Loss, Needs, QueueSize, Recipe, StudentTemperature, TeacherTemperature
from losses.queue import Queue, unit_rows


class SEED(Loss):
    """One view; the teacher with its own head, the student with one like it: Linear(d, d), ReLU, Linear(d, ``dim``)."""

    needs = Needs(teacher="head", head="mlp", gathers=True, also="queue")
    recipe = Recipe(epochs=200, lr=0.03, warmup=None, published={
        "resnet18": "57.60 / 81.80 / 50.12", "resnet34": "58.50 / 82.60 / 45.20",
        "efficientnet_b0": "61.30 / 82.70 / 53.11"})

    def __init__(self, dim: int = 128, queue_size: QueueSize = 65536, s_temp: StudentTemperature = 0.2,
                 t_temp: TeacherTemperature = 1e-4) -> None:
        super().__init__()
        self.queue, self.s_temp, self.t_temp = Queue(queue_size, dim), s_temp, t_temp

    def forward(self, *, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Outputs of both heads [b, dim] for one view. Returns ``loss`` and ``entropy``, the least that it can be."""
        with torch.autocast(student.device.type, enabled=False):
            s, t = unit_rows(student, teacher)
            ours = torch.cat([(s * t).sum(1, keepdim=True), self.queue.similarities(s)], 1)     # [b, 1 + K]
            theirs = torch.cat([(t * t).sum(1, keepdim=True), self.queue.similarities(t)], 1)   # [b, 1 + K]
            log_p = torch.log_softmax(theirs / self.t_temp, 1)
            loss = -(log_p.exp() * torch.log_softmax(ours / self.s_temp, 1)).sum(1).mean()
            self.queue.put(t)
        return {"loss": loss, "entropy": -(log_p.exp() * log_p).sum(1).mean()}
