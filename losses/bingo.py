"""BINGO: pulls an image, one of its neighbours and a mixture of both towards the teacher's outputs for the pair.

Xu et al., "Bag of Instances Aggregation Boosts Self-supervised Distillation", ICLR 2022, arXiv 2107.01691. Student
inputs q, a and their CutMix m, teacher inputs k and b, the second views of the same two images; CE is InfoNCE with
a queue of earlier k as negatives:

    L = 1/3 [sum_{i in q,a} sum_{j in k,b} w_ij CE(i, j) + r CE(m, k) + (1 - r) CE(m, b)]

r is the share of q in m, drawn from Beta(2, 2) once a batch; w is the identity in the first epochs, then one half. The
original refuses a batch size that does not divide the queue, and runs the frozen teacher in training mode, so that its
running statistics move (--teacher-bn train uses the batch's and leaves them unchanged).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from losses.base import Inputs, Loss, Needs, QueueSize, Recipe, StudentTemperature
from losses.queue import Queue, info_nce, unit_rows
from runtime.settings import Setting


class BINGO(Loss):
    """Two views of pairs; the teacher with its own head, the student with Linear(d, 2048), ReLU, Linear(2048, dim)."""

    needs = Needs(views=2, pairs=True, teacher="head", head="wide", passes=1.5, gathers=True, apart=True,
                  also="CutMix, queue")
    recipe = Recipe(epochs=200, lr=0.03, sampler="cf", nearest_k=1, total_k=5, flags=("--teacher-bn", "train"),
                    small=("--s-temp", "0.12", "--wd", "4e-5"), short=("--bingo-alone", "1"),
                    note="200 epochs x 3 passes", published={
                        "resnet18": "61.40 / 84.30 / 54.16", "resnet34": "63.50 / 85.70 / -",
                        "efficientnet_b0": "63.74 / 85.32 / 54.75"})

    def __init__(self, dim: int = 128, queue_size: QueueSize = 65536, s_temp: StudentTemperature = 0.2,
                 bingo_alone: Annotated[int, Setting(
                     "epochs, from the first, in which an image's only positive is its own other view; default "
                     "{default} of 200, the original's", least=0, metavar="N")] = 11) -> None:
        super().__init__()
        self.queue, self.s_temp, self.alone_epochs = Queue(queue_size, dim), s_temp, bingo_alone

    def inputs(self, views: Sequence[Tensor], teachers: Sequence[Tensor]) -> Inputs:
        """Views [2n, 3, S, S] of pairs in turn to the student's three and the teacher's two batches of n."""
        (q, a), (k, b) = ((view[0::2], view[1::2]) for view in (views[0], teachers[1]))
        mixed, share = cutmix(q, a)
        return Inputs((q, a, mixed), (k, b), context={"share": share})

    def forward(self, *, student: tuple[Tensor, Tensor, Tensor], teacher: tuple[Tensor, Tensor], share: float,
                ) -> dict[str, Tensor]:
        """Outputs [n, dim]. Returns ``loss``, its thirds ``anchor``, ``neighbour`` and ``mixed``, and ``accuracy``."""
        own = 1.0 if self.epoch < self.alone_epochs else 0.5
        weights = {"anchor": (own, 1 - own), "neighbour": (1 - own, own), "mixed": (share, 1 - share)}
        with torch.autocast(student[0].device.type, enabled=False):
            (k, b), parts = unit_rows(*teacher), {}
            for (name, (to_k, to_b)), z in zip(weights.items(), unit_rows(*student), strict=True):
                negatives = self.queue.similarities(z)                          # [n, K]
                (loss_k, accuracy), (loss_b, _) = (info_nce(z, x, negatives, self.s_temp) for x in (k, b))
                parts[name] = to_k * loss_k + to_b * loss_b
                parts.setdefault("accuracy", accuracy)
            self.queue.put(k)
        return {**parts, "loss": (parts["anchor"] + parts["neighbour"] + parts["mixed"]) / 3}


def cutmix(images: Tensor, others: Tensor, concentration: float = 2.0) -> tuple[Tensor, float]:
    """``images`` [n, 3, H, W] with one box out of ``others``, and the share of ``images`` that is left.

    Yun et al., "CutMix", ICCV 2019: the box's sides are sqrt(1 - r) of the image's, r ~ Beta, and its centre is
    anywhere; what lies outside is cut off, so the share is computed afterwards. Draws from torch's CPU generator.
    """
    height, width = images.shape[-2:]
    beta = torch.distributions.Beta(*torch.full((2,), concentration, device="cpu"))
    ratio = (1 - float(beta.sample())) ** 0.5
    (top, bottom), (left, right) = (_side(size, int(size * ratio) // 2) for size in (height, width))
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _side(size: int, half: int) -> tuple[int, int]:
    centre = int(torch.randint(size, (), device="cpu"))
    return max(0, centre - half), min(size, centre + half)
