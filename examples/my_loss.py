"""Your own loss, which follows the contract of losses/base.py; its settings become flags, as for built-in losses.

    python train_distill.py --data DIR --distill teacher.pth --loss examples/my_loss.py:Huber --huber-delta 0.5 \\
        --sampler random --output run

This is Huber's loss of the difference between student and teacher: it is quadratic for small differences and linear for
large ones, which therefore count less than in ``--loss mse``.
"""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from losses.base import Loss, Needs
from runtime.settings import Setting


class Huber(Loss):
    """L = mean_ij h(s_ij - t_ij), h(x) = x^2 / 2 below delta and delta (|x| - delta / 2) above."""

    needs = Needs(views=1, teacher="features", head="projection")  # the defaults; losses/base.py explains them

    def __init__(self, huber_delta: Annotated[float, Setting("difference above which it is linear", above=0)] = 1.0,
                 ) -> None:
        super().__init__()
        self.delta = huber_delta

    def forward(self, *, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """``student``, ``teacher``: [b, d]. Returns scalars: ``loss``, and anything else to be logged."""
        difference = student.float() - teacher.float()
        return {"loss": F.huber_loss(difference, difference.new_zeros(()).expand_as(difference), delta=self.delta),
                "largest": difference.detach().abs().max()}
