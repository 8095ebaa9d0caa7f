"""Opening the network that --weights names, and computing its features of a source of images."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch.nn import functional

from checkpoints.by_name import NAME_HELP, folder_beside, look_at_weights
from checkpoints.frozen import load_frozen, untrained
from common import cli
from data.augment import Transform, eval_transform
from data.images import BadImage
from data.loader import BadImageLog, evaluation_loader
from data.sources import ImageSource
from models.backbones import ARCH_HELP, check_arch
from models.teachers import FrozenEncoder
from models.tokens import FEATURES
from runtime.agreement import same_on_every_rank, together
from runtime.device import Process, gather_objects, seed_everything
from runtime.errors import UserError, one_line
from runtime.outputs import check_output_folder
from runtime.settings import Setting, add_settings, declared
from search.features import STORED, Keep, extract, left_out

UNTRAINED = "untrained"
ROWS_AT_ONCE = 65_536


def check_weights(weights: str, flag: str) -> None:
    """Raise :class:`UserError` for a path where no checkpoint can be."""
    if weights != UNTRAINED:
        look_at_weights(weights, flag)


@dataclass(frozen=True)
class Network:
    """Which network."""

    weights: Annotated[str, Setting(
        f"checkpoint of the network{{source}}, {NAME_HELP}; '{UNTRAINED}' gives --arch random weights (by --seed), "
        "as a baseline", "--weights --pretrained_weights", metavar="PATH", basic=True, check=check_weights)]
    arch: Annotated[str | None, Setting(
        f"{ARCH_HELP}; default: determined from the checkpoint", "-a --arch",
        metavar="ARCH", basic=True, check=check_arch)] = None


@dataclass(frozen=True)
class Features:
    """Where and in which type features are cached."""

    features: Annotated[str | None, Setting(
        "folder for the feature cache, which all processes share and later commands use again; default: {source} (no "
        "cache for an untrained network); 'none': no cache, and every process then holds all features in memory",
        metavar="DIR", resumable=True, basic=True)] = None
    dtype: Annotated[str, Setting(
        "type in which features are stored: float32 (default), or, with half the disk space and memory, float16 (3 "
        "digits, up to 65,504) or bfloat16 (2 digits, any size)", choices=sorted(STORED))] = "float32"


def add_weights_flags(parser: argparse.ArgumentParser, several: bool = False, required: bool = True,
                      why: str = "") -> cli.Group:
    """Add --weights (a list of files if ``several``; ``why``: what it is for), --arch, and the flags that say how the
    file is read."""
    group = parser.add_argument_group("network")
    found = declared(Network)
    weights = found["weights"]
    if several:
        weights = replace(weights, setting=replace(weights.setting, nargs="+"))
    weights.add_to(group, **({} if required else {"default": None}), source=", or of each of several" * several + why)
    found["arch"].add_to(group)
    cli.add_network_flags(group)
    return group


def add_features_flags(group: cli.Group,
                       default: str = "features/ beside the weights, or ./features for a name") -> None:
    """Add the flags of the feature cache; ``default`` describes its folder if --features is not given."""
    add_settings(group, Features, source=default)


def open_network(args: argparse.Namespace, process: Process, weights: str | None = None, flag: str = "--weights",
                 ) -> tuple[FrozenEncoder, dict[str, Any]]:
    """The encoder on this process's device, and the values that identify it. ``weights``: a file other than --weights,
    which ``flag`` gave."""
    if getattr(args, "features", None) in FEATURES:
        raise UserError(f"--features {args.features} would name the folder of the feature cache; to choose which "
                        f"tokens of a transformer are its feature, give --feature {args.features}")
    seed_everything(args.seed)
    weights = weights or args.weights
    if weights == UNTRAINED:
        if not args.arch:
            raise UserError(f"{flag} {UNTRAINED} needs --arch; add, for example, --arch resnet18")
        encoder = untrained(args.arch, args.image_size or 224, args.stem or "imagenet", args.feature)
        identity = {"sha256": f"{UNTRAINED}-{args.seed}"}
        line = f"{UNTRAINED}: {encoder.backbone.spec}, random weights of --seed {args.seed}"
    else:
        encoder, report = load_frozen(weights, args.arch, args.stem, args.image_size, flag=flag,
                                      prefix="--teacher-" if flag == "--teacher" else "--",
                                      **cli.checkpoint_options(args))
        identity = {"sha256": report.sha256, "branch": report.branch, "mean": report.mean, "std": report.std}
        line = report.short()
    if process.is_main and not getattr(args, "json", False):
        for text in filter(None, (line, cli.ignored_flags_note(args))):
            say_once(text)
    return encoder.to(process.device), {**identity, **encoder.backbone.spec.record()}


@functools.cache
def say_once(text: str) -> None:
    """Print it unless this process has: `evaluate.py all` opens its networks again for each evaluation."""
    print(text)


def features_identity(encoder: FrozenEncoder, source: ImageSource, args: argparse.Namespace,
                      identity: dict[str, Any], transform: Transform | None = None) -> dict[str, Any]:
    """The values that identify features in the cache. ``transform``: None for the paper's; its str() is recorded."""
    transform = transform or eval_transform(encoder.backbone.spec.image_size)
    bad = f"skip, above {args.max_pixels} pixels too" if args.on_bad_image == "skip" else args.on_bad_image
    return {**identity, "data": source.identity(), "first": str(Path(source.location(0)).absolute()),
            "bad_images": bad, "transform": str(transform)}


def features_of(encoder: FrozenEncoder, source: ImageSource, args: argparse.Namespace, process: Process, label: str,
                identity: dict[str, Any] | None = None, transform: Transform | None = None, folder: Path | None = None,
                batch_size: int | None = None) -> tuple[torch.Tensor, ImageSource]:
    """Features [n, d], and the source of exactly these images, in the order of ``source``. With an ``identity``
    they are read from and written to the cache of --features.

    With --on-bad-image skip, images that could not be opened are missing from both; a sentence names them, also if the
    features come from the cache. ``transform``: by default the paper's for mining and k-NN. ``folder``: the cache if
    --features is not given, by default features/ beside the weights. ``batch_size``: images per forward pass, by
    default --batch-size.
    """
    def loader_of(indices: range) -> Any:
        return evaluation_loader(source, encoder.backbone.spec.image_size, batch_size or args.batch_size, args.workers,
                                 indices, process.device.type, transform=transform)

    same_on_every_rank({"the number of images": len(source), "the images' fingerprint": source.fingerprint(),
                        "the network": identity}, process)
    with together(process):
        folder = features_folder(args, folder) if identity is not None else None
    folder = folder if all(gather_objects(folder is not None)) else None
    keep = None if folder is None else Keep(
        folder, features_identity(encoder, source, args, identity, transform), encoder.backbone.spec.feature_dim,
        args.dtype)
    for note in source.notes if process.is_main else ():
        print(f"{label}: {one_line(note)}", file=sys.stderr if getattr(args, "json", False) else sys.stdout)
    skip = args.on_bad_image == "skip"
    features = extract(encoder, loader_of, len(source), process, label, BadImageLog(source, args.on_bad_image).check,
                       keep, leave_out=skip)
    bad = left_out(features) if skip else np.empty(0, np.int64)
    if not len(bad):
        return features, source
    if len(bad) == len(source):
        raise UserError(f"{label}: none of the {len(source):,} images of {source.title} could be opened; check "
                        f"{source.location(0)}, for example")
    if process.is_main:
        shown = ", ".join(source.shown(i) for i in bad[:5]) + ", ..." * (len(bad) > 5)
        print(f"{label}: {len(bad):,} of {len(source):,} images could not be opened and are left out: {shown}",
              file=sys.stderr if getattr(args, "json", False) else sys.stdout)
    others = source.without(bad)
    return features[others.kept], others


def features_folder(args: argparse.Namespace, default: Path | None = None) -> Path | None:
    """The folder of the feature cache; None for no cache, which is also the result if the default folder cannot be
    written to."""
    if args.features == "none":
        return None
    if not args.features and default is None:
        if args.weights == UNTRAINED:
            return None
        default = folder_beside(args.weights) / "features"
    folder = Path(args.features or default)
    try:
        check_output_folder(folder, "--features")
    except UserError:
        if args.features:
            raise
        return None
    return folder


@torch.inference_mode()
def cosines(encoder: FrozenEncoder, source: ImageSource, images: Sequence[int]) -> dict[int, float]:
    """The cosine of the features of each of ``images`` but the first to the first, by index; unreadable ones are
    missing."""
    transform, opened = eval_transform(encoder.backbone.spec.image_size), {}
    for i in images:
        with contextlib.suppress(BadImage):
            opened[i] = transform(source.open(i))
    if images[0] not in opened:
        return {}
    device = encoder.normalise.shift.device
    rows = functional.normalize(encoder(torch.stack([*opened.values()]).to(device)).float(), dim=1)
    return dict(zip(list(opened)[1:], (rows[1:] @ rows[0]).tolist(), strict=True))


def refuse_zero_rows(features: torch.Tensor, rows: range, source: ImageSource, process: Process) -> None:
    """Raise :class:`UserError` on every rank if a row of ``features`` is all zeros, which has no neighbours; each rank
    checks its own ``rows``."""
    with together(process):
        for first in range(rows.start, rows.stop, ROWS_AT_ONCE):
            part = features[first:min(first + ROWS_AT_ONCE, rows.stop)]
            zero = torch.nonzero((part == 0).all(dim=1)).flatten()
            if len(zero):
                raise UserError(f"the features of {source.location(first + int(zero[0]))} are all zero, so it has no "
                                "neighbours; check the image and the checkpoint")


def share_of(count: int, process: Process) -> range:
    """This rank's share of ``count`` items; shares differ by at most one."""
    return range(count * process.rank // process.world_size, count * (process.rank + 1) // process.world_size)
