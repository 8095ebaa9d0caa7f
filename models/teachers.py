"""The frozen teacher: a trunk from a checkpoint, its input normalisation, and nothing that trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from models.backbones import build_backbone
from models.checkpoints import Report, read_checkpoint
from runtime.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalise(nn.Module):
    """uint8 images [b, 3, H, W] to float32, ``(x / 255 - mean) / std``, on whatever device they are.

    Takes no part in state dicts: normalisation is said in a checkpoint's description, not in its weights.
    """

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        self.register_buffer("shift", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("factor", 1 / (255 * torch.tensor(std)).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        # Channels last: plain convolutions run faster so, SqueezeNet's forward pass several times on a CPU.
        images = images.to(self.shift.dtype, memory_format=torch.channels_last)
        return images.sub_(self.shift).mul_(self.factor)


class Encoder(nn.Module):
    """Normalisation and a trunk: uint8 images [b, 3, H, W] to pooled features [b, d]."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.normalise = backbone, Normalise()

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(self.normalise(images))


class FrozenEncoder(Encoder):
    """An encoder that never trains: no gradients, and evaluation mode whatever a caller asks for."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenEncoder:  # noqa: ARG002 - frozen means frozen
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


def load_frozen(weights: str | Path, arch: str | None = None, stem: str | None = None,
                image_size: int | None = None, *, key: str | None = None, flag: str = "--weights",
                arch_flag: str = "--arch", stem_flag: str = "--stem") -> tuple[FrozenEncoder, Report]:
    """A checkpoint of any known layout as a frozen encoder, and the report of the match.

    What is None is taken from the file's own record; stem and image size are else ``imagenet`` and 224, as in
    every public file. Raises :class:`UserError` on any mismatch.
    """
    checkpoint = read_checkpoint(weights, key, flag)
    arch = arch or checkpoint.arch
    if arch is None:
        raise UserError(f"{flag} {weights} does not say its architecture; add {arch_flag}, for example "
                        f"{arch_flag} resnet50")
    if stem and checkpoint.stem and stem != checkpoint.stem:  # the shapes alone would not tell for every architecture
        raise UserError(f"{stem_flag} {stem} contradicts {weights}, which was trained with the {checkpoint.stem} stem; "
                        "leave the flag out")
    backbone = build_backbone(arch, stem or checkpoint.stem or "imagenet",
                              image_size or checkpoint.image_size or 224, arch_flag)
    report = checkpoint.load_into(backbone)
    return FrozenEncoder(backbone), report


def untrained(arch: str, image_size: int, stem: str = "imagenet", flag: str = "--arch") -> FrozenEncoder:
    """A freshly initialised trunk as a frozen encoder: the yardstick below which nothing was learnt."""
    return FrozenEncoder(build_backbone(arch, stem, image_size, flag))
