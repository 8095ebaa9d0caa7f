"""The frozen teacher: a trunk from a checkpoint, its input normalisation, and nothing that trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from models.backbones import STEMS, build_backbone
from models.checkpoints import read_checkpoint
from models.fold import fold_batch_norm
from models.heads import describe, width_of
from models.match import IMAGENET_MEAN, IMAGENET_STD
from models.report import Report
from runtime.errors import UserError
from runtime.settings import Setting

Stem = Annotated[str | None, Setting(
    "stem of {source}: imagenet (stride 2 and max-pool, as torchvision builds it), cifar (3x3, stride 1, no max-pool, "
    "for images of about 32 pixels) or cifar_pad2 (the same padded by 2, solo-learn's); default: {default}",
    choices=STEMS, unset="what the checkpoint records or its first convolution shows")]


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

    def __init__(self, backbone: nn.Module, mean: Sequence[float] = IMAGENET_MEAN,
                 std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        self.backbone, self.normalise = backbone, Normalise(mean, std)
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(self.normalise(images))


class FrozenEncoder(Encoder):
    """An encoder that never trains: no gradients, and evaluation mode whatever a caller asks for.

    ``head`` is the pre-trained network's own head [b, d] -> [b, d_head], for the losses that ask for it, else None.
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
        """From now on batch norm goes by each batch's statistics; the running ones stay as they are, bit for bit."""
        self.by_batch = [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for module in self.by_batch:
            module.track_running_stats = False
        self.train()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)

    def answers(self, images: Tensor, kinds: Sequence[str]) -> tuple[Tensor, ...]:
        """What a student is held against, for each of ``kinds``: ``features`` [b, d], or its own ``head``'s output."""
        with torch.inference_mode():
            features = self(images)
            found = [features if kind == "features" else self.head(features) for kind in kinds]
        return tuple(x.clone() for x in found)  # ordinary tensors again, which a loss's graph may keep

    def fold(self) -> int:
        """Fold batch norms into the convolutions before them (models.fold); returns how many were.

        Features stay the same to within 1e-5 of their length in float32. The tensors are no longer those of the file.
        Batch norm that goes by each batch's statistics cannot be folded.
        """
        if self.by_batch:
            return 0
        self.backbone, count = fold_batch_norm(self.backbone)
        return count

    def widths(self) -> dict[str, int]:
        """Of each kind of :meth:`answers`."""
        width = self.backbone.spec.feature_dim
        return {"features": width, **({"head": width_of(self.head, width)} if self.head else {})}


def load_frozen(
    weights: str | Path, arch: str | None = None, stem: Stem = None, image_size: int | None = None, *,
    branch: Annotated[str | None, Setting(
        "which network of a file with several (encoder_k, momentum_encoder, student.backbone, ...; "
        "inspect_checkpoint.py lists them); default: the one that the method's own evaluation uses",
        metavar="NAME")] = None,
    mean: Annotated[Sequence[float] | None, Setting(
        "mean of red, green and blue that the network was trained with, of images in [0, 1]; default: its layout's, "
        "which the report shows (ImageNet's for most)", nargs=3, item=float, metavar="X")] = None,
    std: Annotated[Sequence[float] | None, Setting("the same for the standard deviation", nargs=3, item=float, above=0,
                                                   metavar="X")] = None,
    checkpoint_key: Annotated[str | None, Setting(
        "entry of the file that holds the weights; default: found (state_dict, model, or bare)",
        "--checkpoint-key --checkpoint_key", metavar="KEY")] = None,
    trust_checkpoint: Annotated[bool, Setting(
        "unpickle whatever the file holds, which runs the code that it names; without it files are read without "
        "running anything, and those that need it are refused")] = False,
    with_head: bool = False, flag: str = "--weights", prefix: str = "--",
) -> tuple[FrozenEncoder, Report]:
    """A checkpoint of any known layout as a frozen encoder, and the report of the match.

    What is None is taken from the file: its record, its tensors' shapes, its layout. ``with_head`` reads the
    pre-trained network's own head too. ``flag`` and ``prefix`` (of --arch, --stem, --branch) are for messages.
    Raises :class:`UserError` on any mismatch.
    """
    checkpoint = read_checkpoint(weights, checkpoint_key, flag, branch=branch, branch_flag=f"{prefix}branch",
                                 trust=trust_checkpoint)
    found = checkpoint.identify(arch, stem, image_size, arch_flag=f"{prefix}arch", stem_flag=f"{prefix}stem")
    backbone = build_backbone(found.arch, found.stem, found.image_size, f"{prefix}arch")
    report = checkpoint.load_into(backbone)
    head = checkpoint.head() if with_head else None
    report.head = describe(head) if head else None
    report.mean, report.std = list(mean or report.mean), list(std or report.std)
    if not all(x > 0 for x in report.std):
        raise UserError(f"{prefix}std {' '.join(map(str, report.std))} must be above 0; give the three values of the "
                        "pre-training")
    return FrozenEncoder(backbone, report.mean, report.std, head), report


def untrained(arch: str, image_size: int, stem: str = "imagenet", flag: str = "--arch") -> FrozenEncoder:
    """A freshly initialised trunk as a frozen encoder: the yardstick below which nothing was learnt."""
    return FrozenEncoder(build_backbone(arch, stem, image_size, flag))
