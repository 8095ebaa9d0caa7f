"""The student as it is trained: trunk, projection where widths differ, and the loss against the teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.match import IMAGENET_MEAN, IMAGENET_STD
from models.teachers import Normalise

HIDDEN = 2048  # of the projection head, in the paper's code


class Distiller(nn.Module):
    """Everything that trains, so that DistributedDataParallel wraps it whole. The teacher stands outside.

    State dict keys are ``backbone.*`` and ``proj_head.*``, as in the original code; a loss that has tensors of
    its own adds ``loss.*``.
    """

    def __init__(self, backbone: nn.Module, teacher_dim: int, loss: nn.Module, beta: float = 1.0) -> None:
        super().__init__()
        self.backbone, self.loss, self.beta = backbone, loss, beta
        self.normalise = Normalise()
        self.proj_head = projection_head(backbone.spec.feature_dim, teacher_dim)

    def forward(self, images: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Images uint8 [b, 3, H, W] and the teacher's features [b, d_t] of the same images.

        Returns the loss's dict, with ``loss`` times ``beta``, and ``student``: its features [b, d_t], detached.
        """
        student = self.backbone(self.normalise(images))     # [b, d_s]
        student = self.proj_head(student)                   # [b, d_t]
        parts = self.loss(student=student, teacher=teacher)
        return {**parts, "loss": self.beta * parts["loss"], "student": student.detach()}

    def student_state(self) -> dict[str, Tensor]:
        """Trunk and projection alone, under the original's names."""
        return {k: v for k, v in self.state_dict().items() if k.startswith(("backbone.", "proj_head."))}

    def record(self) -> dict[str, Any]:
        """What the student is, for its checkpoint."""
        return {**self.backbone.spec.record(), "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}


def projection_head(student_dim: int, teacher_dim: int) -> nn.Module:
    """Linear(d_s, 2048), ReLU, Linear(2048, d_t) where the widths differ, else nothing (paper, section 4)."""
    if student_dim == teacher_dim:
        return nn.Identity()
    return nn.Sequential(nn.Linear(student_dim, HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, teacher_dim))


@torch.no_grad()
def agreement(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """How near the student is, whatever the loss: for the log. Features [b, d] each.

    ``student_norm``: mean row norm; ``row_cosine``: mean cosine of rows; ``dim_correlation``: mean over
    dimensions of the Pearson correlation with the teacher's same dimension over the batch, in [-1, 1].
    """
    s, t = student.float(), teacher.float()
    centred_s, centred_t = s - s.mean(0), t - t.mean(0)
    return {"student_norm": s.norm(dim=1).mean(),
            "row_cosine": torch.cosine_similarity(s, t, dim=1).mean(),
            "dim_correlation": torch.cosine_similarity(centred_s, centred_t, dim=0).mean()}
