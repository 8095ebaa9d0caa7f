"""A checkpoint of any known layout as a frozen encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from checkpoints.reader import read_checkpoint
from checkpoints.report import Report
from models.backbones import STEMS, build_backbone
from models.heads import describe
from models.teachers import FrozenEncoder
from models.tokens import FEATURES
from runtime.errors import UserError
from runtime.settings import Setting

Stem = Annotated[str | None, Setting(
    "stem of {source}: imagenet (stride 2 and max-pool, as in torchvision), cifar (3x3, stride 1, no max-pool, for "
    "images of about 32 pixels) or cifar_pad2 (like cifar, but padded by 2, as in solo-learn); default: {default}",
    choices=STEMS, unset="what the checkpoint records or its first convolution shows")]


def load_frozen(
    weights: str | Path, arch: str | None = None, stem: Stem = None, image_size: int | None = None, *,
    feature: Annotated[str, Setting(
        "which tokens of a vision transformer are its feature: the class token after the last norm (cls), the mean of "
        "the patch tokens (mean), both concatenated (cls+mean), or the network's own pooling (pool: SigLIP's attention "
        "pooling, CLIP's projection); default {default}: as the file records, else as in its authors' own evaluation "
        "(docs/CHECKPOINTS.md)", choices=FEATURES)] = "auto",
    branch: Annotated[str | None, Setting(
        "which network to read from a file with several (encoder_k, momentum_encoder, student.backbone, ...; "
        "inspect_checkpoint.py lists them); default: the one that the method's own evaluation uses",
        metavar="NAME")] = None,
    mean: Annotated[Sequence[float] | None, Setting(
        "mean of red, green and blue by which the network's input is normalised, for images in [0, 1]; default: as in "
        "its layout, which the report shows (mostly ImageNet's)", nargs=3, item=float, least=0, most=1,
        metavar="X")] = None,
    std: Annotated[Sequence[float] | None, Setting("the same for the standard deviation", nargs=3, item=float,
                                                   least=0.001, most=1, metavar="X")] = None,
    checkpoint_key: Annotated[str | None, Setting(
        "entry of the file that holds the weights; default: determined from the file (state_dict, model, or none)",
        "--checkpoint-key --checkpoint_key", metavar="KEY")] = None,
    trust_checkpoint: Annotated[bool, Setting(
        "unpickle everything in the file, which runs the code that it names; without this flag no code from files is "
        "run, and files that need that are refused")] = False,
    with_head: bool = False, flag: str = "--weights", prefix: str = "--",
) -> tuple[FrozenEncoder, Report]:
    """A checkpoint of any known layout as a frozen encoder, and the report of the match.

    Arguments that are None are determined from the file: what it records, the shapes of its tensors, its layout.
    ``with_head`` also reads the pretrained network's own head. ``flag`` and ``prefix`` (of --arch, --stem, --branch,
    --feature) are for messages. Raises :class:`UserError` on any mismatch.
    """
    checkpoint = read_checkpoint(weights, checkpoint_key, flag, branch=branch, branch_flag=f"{prefix}branch",
                                 trust=trust_checkpoint)
    found = checkpoint.identify(arch, stem, image_size, arch_flag=f"{prefix}arch", stem_flag=f"{prefix}stem")
    backbone = build_backbone(found.arch, found.stem, found.image_size, checkpoint.feature(feature), f"{prefix}arch")
    checkpoint = checkpoint.over(backbone)
    report = checkpoint.load_into(backbone)
    head = checkpoint.head() if with_head else None
    report.head = describe(head) if head else None
    report.mean, report.std = list(mean or report.mean), list(std or report.std)
    if not all(x > 0 for x in report.std):
        raise UserError(f"{prefix}std {' '.join(map(str, report.std))} must be above 0; give the three values of the "
                        "pretraining")
    return FrozenEncoder(backbone, report.mean, report.std, head), report


def untrained(arch: str, image_size: int, stem: str = "imagenet", feature: str = "auto") -> FrozenEncoder:
    """A randomly initialised trunk as a frozen encoder, which serves as a baseline."""
    return FrozenEncoder(build_backbone(arch, stem, image_size, feature))
