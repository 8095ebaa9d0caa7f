"""The student during training: trunk and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.teachers import IMAGENET_MEAN, IMAGENET_STD, Encoder, Normalise


class Distiller(nn.Module):
    """Everything that is trained, so that DistributedDataParallel can wrap it. Teacher and loss are separate.

    State dict keys are ``backbone.*`` and ``proj_head.*``, as in the original code. ``head``, from models.heads, maps
    [b, d_s] to [b, d], or to a tuple of several such outputs.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, mean: Sequence[float] = IMAGENET_MEAN,
                 std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        self.backbone, self.proj_head = backbone, head
        self.normalise, self.mean, self.std = Normalise(mean, std), tuple(mean), tuple(std)

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Batches of images uint8 [b, 3, H, W] to outputs [b, d]: those of every head for the first batch, then those
        for the second, and so on.

        Each batch has a separate forward pass, so that batch norm uses the statistics of one view, as in the original
        code of the methods.
        """
        outputs: list[Tensor] = []
        for images in views:
            output = self.proj_head(self.backbone(self.normalise(images)))
            outputs += [output] if isinstance(output, Tensor) else output
        return tuple(outputs)

    def student_state(self) -> dict[str, Tensor]:
        """The state dict of trunk and head, under the original's names, with contiguous tensors."""
        return {name: tensor.contiguous() for name, tensor in self.state_dict().items()}

    def encoder(self) -> Encoder:
        """The trunk as an encoder, without the head, on the same device."""
        return Encoder(self.backbone, self.mean, self.std).to(self.normalise.shift.device)

    def record(self) -> dict[str, Any]:
        """The description of the student that its checkpoint records."""
        return {**self.backbone.spec.identity(), "mean": list(self.mean), "std": list(self.std)}


@torch.no_grad()
def agreement(student: Tensor, teacher: Tensor | None = None) -> dict[str, Tensor]:
    """Measures, for the log, of how close the student is to the teacher, independent of the loss. Outputs are [b, d]
    each. Without a teacher, or if the widths differ, only ``student_norm``.

    ``student_norm``: mean norm of the rows; ``row_cosine``: mean cosine of corresponding rows; ``constant_cosine``:
    that of the teacher's rows with their mean; ``dim_correlation``: Pearson correlation over the batch of each
    dimension with the teacher's, in [-1, 1], averaged over dimensions.
    """
    s = student.float()
    if teacher is None or teacher.shape != student.shape:
        return {"student_norm": s.norm(dim=1).mean()}
    t = teacher.float()
    centred_s, centred_t = s - s.mean(0), t - t.mean(0)
    return {"student_norm": s.norm(dim=1).mean(),
            "row_cosine": torch.cosine_similarity(s, t, dim=1).mean(),
            "constant_cosine": torch.cosine_similarity(t, t.mean(0, keepdim=True), dim=1).mean(),
            "dim_correlation": torch.cosine_similarity(centred_s, centred_t, dim=0).mean()}
