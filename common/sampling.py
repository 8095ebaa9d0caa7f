"""--sampler with its files and settings: which images form a step. What samplers declare becomes flags here."""

from __future__ import annotations

import argparse

import losses
from checkpoints.report import Report
from common import cli
from data import samplers
from data.augment import PRESETS
from data.epoch_length import FixedLengthEpochs
from data.neighbours import refuse_composed_batches
from data.samplers import SAMPLERS, RandomSampler
from data.sources import ImageSource
from runtime.device import Process
from runtime.errors import UserError
from runtime.settings import add_settings


def add_batch_flags(parser: argparse.ArgumentParser) -> None:
    """Augmentation, --sampler, and the files and settings of all samplers."""
    group = parser.add_argument_group("batches")
    group.add_argument("--aug", choices=sorted(PRESETS), default="moco_v2",
                       help="augmentation; default moco_v2, the paper's")
    group.add_argument("--sampler", choices=sorted(SAMPLERS), default="cf", help=_sampler_help())
    group.add_argument("-b", "--batch-size", type=cli.number(int, 1), default=64, metavar="N",
                       help="anchors of a step over all processes; default 64, the paper's (on 4 GPUs with 15 "
                            "neighbours each: 256 images a GPU)")
    found = [table.declared for table in samplers.tables().values()]
    found += [next(iter(owners.values())) for owners in samplers.settings().values()]
    for declared in found:
        declared.add_to(group)
        cli.only(group, declared.flag, samplers.used_by(declared.name),
                 lambda args, name=declared.name: chosen_sampler(args).takes(name))
    add_settings(group, FixedLengthEpochs, epoch_steps=None)


def _sampler_help() -> str:
    words = [f"{name}{' (default)' * (name == 'cf')}: {kind.about}" + (
        f", or, {kind.stand_in.about}" if kind.stand_in else "")
        for name, kind in SAMPLERS.items()]
    return "; ".join(words)


def _paths(args: argparse.Namespace) -> dict[str, str | None]:
    return {name: vars(args)[name] for name in samplers.tables()}


def chosen_sampler(args: argparse.Namespace) -> type[RandomSampler]:
    """What --sampler and the files beside it name."""
    return samplers.sampler_of(args.sampler, _paths(args))


def check_sampler(args: argparse.Namespace) -> None:
    """Check the command line alone, before anything is read."""
    kind = chosen_sampler(args)
    for name, table in samplers.tables().items():
        if path := _paths(args)[name]:
            refuse_composed_batches(path, table.flag)
    for table in samplers.missing(kind, _paths(args)):
        raise UserError(f"--sampler {args.sampler} needs {table.flag} FILE, {table.what}, or use --sampler random, "
                        "which needs no file")
    kind.check(**_settings(args))
    if kind.uneven_steps:
        for flag, given in (("--micro-batch", args.micro_batch), ("--epoch-steps", args.epoch_steps),
                            (f"--loss {args.loss}", losses.needs_of(args.loss).gathers)):
            if given:
                raise UserError(f"{flag} needs steps of one size, and {kind.uneven_steps}")


def _settings(args: argparse.Namespace) -> dict[str, object]:
    return {name: vars(args)[name] for name in samplers.settings()}


def open_sampler(args: argparse.Namespace, process: Process, source: ImageSource,
                 teacher: Report | None) -> tuple[RandomSampler, ImageSource, list[str]]:
    """The sampler that --sampler names, its images, and notes about its files, which are compared with the teacher."""
    made_by = teacher and {"teacher_sha256": teacher.sha256, "feature": teacher.feature,
                           "image_size": teacher.image_size}
    sampler, source, notes = samplers.build_sampler(
        chosen_sampler(args), source, _paths(args), made_by, batch_size=args.batch_size, rank=process.rank,
        world_size=process.world_size, seed=args.seed, **_settings(args))
    return FixedLengthEpochs(sampler, args.epoch_steps) if args.epoch_steps else sampler, source, notes
