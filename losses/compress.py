"""CompRess: the student's similarities to its own past outputs follow the teacher's similarities to its own.

Abbasi Koohpayegani, Tejankar and Pirsiavash, "CompRess: Self-Supervised Learning by Compressing Representations",
NeurIPS 2020, arXiv 2010.14713. SEED with two queues of the same images: Q_t of the teacher's unit
features, Q_s of a momentum student's, so that no projection between the two spaces is needed:

    L = mean_i KL(softmax(z_t.Q_t / T) || softmax(z_s.Q_s / T))

The queues are long and wide: 128,000 x 2,048 are 1.05 GB on each process, and 128,000 x 512 another 0.26 GB. In the
original they begin with independent noise, which teaches nothing for K / B steps (here items not yet filled are
excluded), and are not saved in checkpoints (here they are).
"""

from __future__ import annotations

import torch
from torch import Tensor

from losses.base import Loss, Needs, QueueSize, Recipe, StudentTemperature, TeacherTemperature
from losses.queue import Queue, unit_rows

EXCLUDED = -1e4  # logit of an excluded item: its softmax is zero, and without any other item there is no NaN


class CompRess(Loss):
    """One view, pooled features of any two widths, no heads."""

    needs = Needs(head="none", momentum=True, gathers=True, also="2 queues")
    recipe = Recipe(epochs=130, lr=0.01, published={"resnet18": "61.7"},
                    note="its authors' repository, another linear protocol; they only crop and flip, and divide the "
                         "rate by 5 at epochs 90 and 120, here a cosine")

    def __init__(self, dim: int = 2048, student_dim: int = 512, queue_size: QueueSize = 128000,
                 s_temp: StudentTemperature = 0.04, t_temp: TeacherTemperature = 0.04) -> None:
        super().__init__()
        self.theirs, self.ours = Queue(queue_size, dim), Queue(queue_size, student_dim)
        self.s_temp, self.t_temp = s_temp, t_temp

    def forward(self, *, student: Tensor, teacher: Tensor, momentum: Tensor) -> dict[str, Tensor]:
        """Features [b, student_dim], [b, dim] and the momentum student's [b, student_dim]. Returns ``loss``."""
        with torch.autocast(student.device.type, enabled=False):
            s, t, m = unit_rows(student, teacher, momentum)
            empty = ~self.theirs.filled()
            log_p = torch.log_softmax((self.theirs.similarities(t) / self.t_temp).masked_fill(empty, EXCLUDED), 1)
            log_q = torch.log_softmax((self.ours.similarities(s) / self.s_temp).masked_fill(empty, EXCLUDED), 1)
            loss = (log_p.exp() * (log_p - log_q)).sum(1).mean()                                # [b, K] -> []
            self.theirs.put(t)
            self.ours.put(m)
        return {"loss": loss}
