"""The student as it is trained: trunk and head, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.teachers import IMAGENET_MEAN, IMAGENET_STD, Encoder, Normalise


class Distiller(nn.Module):
    """Everything that trains, so that DistributedDataParallel wraps all of it. Teacher and loss are separate.

    State dict keys are ``backbone.*`` and ``proj_head.*``, as in the original code. ``head``: [b, d_s] -> [b, d], or a
    tuple of several, of models.heads.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, mean: Sequence[float] = IMAGENET_MEAN,
                 std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        self.backbone, self.proj_head = backbone, head
        self.normalise, self.mean, self.std = Normalise(mean, std), tuple(mean), tuple(std)

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Batches of images uint8 [b, 3, H, W] to outputs [b, d]: of every head for the first, then for the second.

        Each batch passes separately, so that batch norm uses the statistics of one view, as in the methods' own code.
        """
        outputs: list[Tensor] = []
        for images in views:
            output = self.proj_head(self.backbone(self.normalise(images)))
            outputs += [output] if isinstance(output, Tensor) else output
        return tuple(outputs)

    def student_state(self) -> dict[str, Tensor]:
        """Trunk and head, under the original's names, each tensor in the plain order whatever it is while training."""
        return {name: tensor.contiguous() for name, tensor in self.state_dict().items()}

    def encoder(self) -> Encoder:
        """The trunk as it is used afterwards: without the head, on the same device."""
        return Encoder(self.backbone, self.mean, self.std).to(self.normalise.shift.device)

    def record(self) -> dict[str, Any]:
        """What the student is, for its checkpoint."""
        return {**self.backbone.spec.identity(), "mean": list(self.mean), "std": list(self.std)}


@torch.no_grad()
def agreement(student: Tensor, teacher: Tensor | None = None) -> dict[str, Tensor]:
    """How close the student is to the teacher, whatever the loss: for the log. Outputs [b, d] each; without a teacher,
    or if widths differ, only the first measure.

    ``student_norm``: mean row norm; ``row_cosine``: mean cosine of rows; ``dim_correlation``: mean over
    dimensions of the Pearson correlation with the same dimension of the teacher, over the batch, in [-1, 1].
    """
    s = student.float()
    if teacher is None or teacher.shape != student.shape:
        return {"student_norm": s.norm(dim=1).mean()}
    t = teacher.float()
    centred_s, centred_t = s - s.mean(0), t - t.mean(0)
    return {"student_norm": s.norm(dim=1).mean(),
            "row_cosine": torch.cosine_similarity(s, t, dim=1).mean(),
            "dim_correlation": torch.cosine_similarity(centred_s, centred_t, dim=0).mean()}
