"""Encoders: a trunk with its input normalisation; and the frozen encoder, which serves as the teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.fold import fold_batch_norm
from models.heads import width_of

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalise(nn.Module):
    """uint8 images [b, 3, H, W] to float32, ``(x / 255 - mean) / std``, on their device.

    Its buffers are not in state dicts: a checkpoint records mean and std in its description, not among its weights.
    """

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        self.register_buffer("shift", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("factor", 1 / (255 * torch.tensor(std)).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        # Channels last makes plain convolutions faster, SqueezeNet's forward pass on a CPU several times.
        images = images.to(self.shift.dtype, memory_format=torch.channels_last)
        return images.sub_(self.shift).mul_(self.factor)


class Encoder(nn.Module):
    """Normalisation and a trunk: uint8 images [b, 3, H, W] to pooled features [b, d]."""

    def __init__(self, backbone: nn.Module, mean: Sequence[float] = IMAGENET_MEAN,
                 std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        self.backbone, self.normalise = backbone, Normalise(mean, std)
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(self.normalise(images))


class FrozenEncoder(Encoder):
    """An encoder that is never trained: it has no gradients and stays in evaluation mode, even if .train() is called.

    ``head`` is the pretrained network's own head [b, d] -> [b, d_head] if the loss needs it, else None.
    """

    def __init__(self, backbone: nn.Module, mean: Sequence[float] = IMAGENET_MEAN,
                 std: Sequence[float] = IMAGENET_STD, head: nn.Module | None = None) -> None:
        super().__init__(backbone, mean, std)
        self.head = head
        self.by_batch: list[nn.Module] = []
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenEncoder:  # noqa: ARG002 - frozen means frozen
        super().train(False)
        for module in self.by_batch:
            module.training = True
        return self

    def use_batch_statistics(self) -> None:
        """Make batch norm use the statistics of each batch from now on; the running statistics do not change."""
        self.by_batch = [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for module in self.by_batch:
            module.track_running_stats = False
        self.train()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)

    def targets(self, images: Tensor, kinds: Sequence[str]) -> tuple[Tensor, ...]:
        """One target for each of ``kinds``: ``features`` [b, d], or the output [b, d_head] of ``head``."""
        with torch.inference_mode():
            features = self(images)
            found = [features if kind == "features" else self.head(features) for kind in kinds]
        return tuple(x.clone() for x in found)  # ordinary tensors, which autograd may save, unlike inference tensors

    def fold(self) -> int:
        """Fold batch norms into the convolutions before them (models.fold); returns how many were folded.

        Features stay the same to within 1e-5 of their length in float32. The tensors then differ from the file's.
        Batch norm that uses the statistics of each batch is not folded.
        """
        if self.by_batch:
            return 0
        self.backbone, count = fold_batch_norm(self.backbone)
        return count

    def round(self, dtype: torch.dtype | None) -> None:
        """Round the weights of convolutions and linear layers to ``dtype`` once, instead of in each step; None: do
        nothing.

        Afterwards the encoder must run under autocast to ``dtype``, where its outputs are bit-identical to before.
        """
        for module in self.modules() if dtype else ():
            if isinstance(module, nn.Conv2d | nn.Linear):
                for name, weight in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(weight.detach().to(dtype), requires_grad=False))

    def widths(self) -> dict[str, int]:
        """The width of each kind of :meth:`targets`."""
        width = self.backbone.spec.feature_dim
        return {"features": width, **({"head": width_of(self.head, width)} if self.head else {})}
