"""DisCo: MoCo v2 for the student, and its outputs drawn to the teacher's.

Gao et al., "DisCo: Remedying Self-supervised Learning on Lightweight Models with Distilled Contrastive Learning",
ECCV 2022, arXiv 2104.09124. With unit outputs s and t of both heads for two views x1, x2:

    L = L_MoCo(s(x1), momentum(x2)) + w mean_i (|t_i(x1) - s_i(x1)|^2 + |t_i(x2) - s_i(x2)|^2)

The original sums the squares over a process's batch, so that the weight of the teacher falls as GPUs are added. Here it
is a mean with a weight, 32 by default: what that sum comes to at its 256 images on 8 GPUs, whatever the number of GPUs.
``summed`` is the original's sum. Its teacher runs in training mode (--teacher-bn train), ours does not unless told to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from losses.base import Inputs, Loss, Needs
from losses.queue import Queue, info_nce, unit_rows


class DisCo(Loss):
    """Two views; the teacher with its own head, the student with Linear(d, 2048), ReLU, Linear(2048, ``dim``)."""

    needs = Needs(views=2, teacher="head", head="wide", momentum=True, passes=2)

    def __init__(self, dim: int = 128, queue_size: int = 65536, s_temp: float = 0.2, disco_weight: float = 32.0,
                 disco_sum: bool = False) -> None:
        super().__init__()
        self.queue, self.s_temp = Queue(queue_size, dim), s_temp
        self.weight, self.summed = disco_weight, disco_sum

    @property
    def per_process(self) -> bool:
        return self.summed

    def inputs(self, views: Sequence[Tensor]) -> Inputs:
        """Student and teacher see both views, the moving average the second."""
        return Inputs(views, views, views[1:])

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
