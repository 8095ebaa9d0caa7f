"""What all evaluations share: flags, opening a network, cached features, and writing the result."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from checkpoints.by_name import NAME_HELP, folder_beside, look_at_weights, sha256_of, short_name
from checkpoints.frozen import load_frozen
from checkpoints.reader import read_checkpoint
from common import cli, networks
from data.augment import Transform
from data.checks import check_apart
from data.sources import ImageSource
from evals.metrics import of_one_class
from evals.results import add_result, save_table, table
from models.backbones import check_arch
from models.teachers import FrozenEncoder
from models.tokens import FEATURES
from runtime.device import Process
from runtime.errors import UserError
from runtime.outputs import check_output_folder
from runtime.provenance import versions
from runtime.settings import Setting, add_settings, declared

LABELLED = ("labelled images: a folder that holds train/ and val/ or test/, each with one sub-folder a class (or "
            "packed files of these names), or a data set (demo, digits, cifar10, cifar100, stl10; stored in "
            "$COSS_DATASETS, else ./datasets)")
SHARE_OF = "each class's training images; default 1, the paper's 1% and 10% rows use 0.01 and 0.1"
Steps = list[tuple[str, "list[str] | str"]]  # for `evaluate.py all`: a name and its flags, or why it is left out
UNLABELLED = ("overlap", "map", "video")  # commands that ignore classes


@dataclass(frozen=True)
class Results:
    """Where a result goes, and how it is printed."""

    output: Annotated[str | None, Setting(
        "folder for results.jsonl (one line per evaluation), the table and the feature cache; default: "
        "evaluation/ beside the weights, or ./evaluation for a name and an untrained network", metavar="FOLDER",
        resumable=True, basic=True)] = None
    json: Annotated[bool, Setting("print only one JSON object on stdout; messages go to stderr",
                                  resumable=True, basic=True)] = False


@dataclass(frozen=True)
class Extraction:
    """How features are extracted."""

    feature_batch: Annotated[int, Setting(
        "images per forward pass when extracting features; default {default}, the original's", least=1,
        metavar="N", resumable=True)] = 256


def add_common_flags(parser: argparse.ArgumentParser, *names: str, data: str = LABELLED, required: bool = True,
                     several: bool = False, needs_weights: bool = True, keeps_features: bool = True,
                     share_of: str = SHARE_OF) -> cli.Group:
    """Flags of every evaluation: --data (``names``: other spellings; ``data``: its help; optional unless ``required``),
    --subset (``share_of`` ends its help), --weights (a list if ``several``, optional unless ``needs_weights``),
    --output, --json, --device, --seed; and, if it ``keeps_features``, how images are read and where features are kept.
    Returns the data group."""
    group = cli.add_data_flags(parser, *names, what=data, required=required, opens_images=keeps_features,
                               share_of=share_of)
    if keeps_features:
        add_settings(group, Extraction)
    networks.add_weights_flags(parser, several, needs_weights)
    out = parser.add_argument_group("results")
    add_settings(out, Results)
    if keeps_features:
        networks.add_features_flags(out, "features/ in --output")
    cli.add_device_flags(parser)
    return group


def on_data(args: argparse.Namespace, *flags: str, needs: Sequence[str] = ()) -> list[str] | str:
    """``flags`` of an evaluation on --data, or why it is left out of `evaluate.py all`. ``needs``: names of other flags
    without which it cannot be."""
    return lacks(args, "data", *needs) or ["--data", args.data, *flags]


def lacks(args: argparse.Namespace, *names: str) -> str | None:
    """Which of the flags of these names were not given, in words; None if all were."""
    missing = [f"--{name}" for name in names if not getattr(args, name)]
    return f"it needs {' and '.join(missing)}" if missing else None


WHOLE = ("--subset", "1")  # of test images


def root_of(args: argparse.Namespace) -> Path:
    """--root of `evaluate.py all`. Raises :class:`UserError` if it is not a folder."""
    if not Path(args.root).is_dir():
        raise UserError(f"--root {args.root} is not a folder; give the folder that holds the sets")
    return Path(args.root)


@dataclass(frozen=True)
class Network:
    """A network to be evaluated: the file, the encoder on this process's device, and what identifies it."""

    file: str
    encoder: FrozenEncoder
    identity: dict[str, Any]

    @property
    def spec(self) -> Any:
        """models.backbones.Spec: arch, stem, image_size, feature_dim."""
        return self.encoder.backbone.spec

    def record(self) -> dict[str, Any]:
        """What a result records of the network."""
        return {"weights": self.file, "sha256": self.identity["sha256"], "branch": self.identity.get("branch"),
                **self.spec.record(), "mean": list(self.encoder.mean), "std": list(self.encoder.std)}


def open_network(args: argparse.Namespace, process: Process, weights: str | None = None, flag: str = "--weights",
                 ) -> Network:
    """The network of --weights, or of another file that ``flag`` gave."""
    encoder, identity = networks.open_network(args, process, weights, flag)
    return Network(weights or args.weights, encoder, identity)


def add_teacher_flags(group: cli.Group, required: bool = True) -> None:
    """The teacher to compare the students of --weights with, and the students' names."""
    group.add_argument("--teacher", required=required, metavar="FILE",
                       help=f"checkpoint of the teacher, {NAME_HELP}, read as in the students' training; each "
                            "network sees its own image size")
    cli.check_by(group, "--teacher", look_at_weights)
    group.add_argument("--teacher-arch", default=None, metavar="ARCH",
                       help="--arch of the teacher; default, here and below: what --weights record, else found")
    cli.check_by(group, "--teacher-arch", check_arch)
    group.add_argument("--teacher-image-size", type=cli.number(int, 8, 8192), default=None, metavar="S",
                       help="--image-size of the teacher; default: what --weights record, whatever --image-size "
                            "says, else --image-size")
    group.add_argument("--teacher-feature", choices=FEATURES, default="auto", help="--feature of the teacher")
    cli.stem_flag(group, "--teacher-stem", whose="the teacher")
    group.add_argument("--teacher-branch", default=None, metavar="NAME", help="--branch of the teacher")
    group.add_argument("--names", nargs="+", default=None, metavar="NAME",
                       help="names of the students in tables and picture, one per file; default: the file's "
                            "name, or the folder's name for student.pth or checkpoint.pth")


def teacher_args(args: argparse.Namespace) -> argparse.Namespace:
    """The flags for reading the teacher's file; those not given are as in the students' training."""
    found = recorded_teacher(args)
    given = {"arch": args.teacher_arch, "stem": args.teacher_stem, "branch": args.teacher_branch,
             "image_size": args.teacher_image_size, "mean": None, "std": None}
    read = {name: value or found.get(name) or None for name, value in given.items()}
    read["image_size"] = read["image_size"] or args.image_size  # that of the students, where none is recorded
    feature = args.teacher_feature if args.teacher_feature != "auto" else found.get("feature", "auto")
    return changed(args, feature=feature, **read)


def recorded_teacher(args: argparse.Namespace) -> dict[str, Any]:
    """checkpoints.report.Report.record() of --teacher as recorded by the students trained with this file; empty if they
    differ, or if no student was trained with it."""
    found = [read_checkpoint(file, args.checkpoint_key, trust=args.trust_checkpoint).meta.get("teacher")
             for file in args.weights if file != networks.UNTRAINED]
    digest = sha256_of(args.teacher, "--teacher") if any(found) else None
    read = [{name: one.get(name) for name in ("arch", "stem", "branch", "image_size", "feature", "mean", "std")}
            for one in found if one and one["sha256"] == digest]
    return read[0] if read and all(one == read[0] for one in read) else {}


def changed(args: argparse.Namespace, **values: Any) -> argparse.Namespace:
    """The same flags with other values."""
    return argparse.Namespace(**{**vars(args), **values})


def student_names(files: Sequence[str], given: Sequence[str] | None) -> list[str]:
    """A distinct name for each file. Raises :class:`UserError` for a list of another length or with duplicates."""
    if given is not None and (len(given) != len(files) or len(set(given)) != len(given)):
        raise UserError(f"--names gives {len(given)} names for {len(files)} files of --weights; give one for each, no "
                        "two the same")
    if given is not None:
        return list(given)
    names = [Path(x).parent.name if Path(x).name in ("student.pth", "checkpoint.pth") else short_name(x) for x in files]
    names = [name or short_name(file) for name, file in zip(names, files, strict=True)]
    return names if len(set(names)) == len(names) else [f"{i}: {name}" for i, name in enumerate(names, 1)]


def open_output(args: argparse.Namespace) -> Path:
    """The folder of --output; refused before any work if it cannot be written. Created with the first file."""
    first = args.weights if isinstance(args.weights, str) else args.weights[0]
    beside = Path() if first == networks.UNTRAINED else folder_beside(first)
    folder = Path(args.output or beside / "evaluation")
    check_output_folder(folder, "--output")
    check_apart(folder, args.data)
    return folder


def features(network: Network, source: ImageSource, args: argparse.Namespace, process: Process, label: str,
             transform: Transform | None = None) -> tuple[torch.Tensor, ImageSource]:
    """Features [N, d] of a source's images in order, on the CPU, computed once and cached in --output; and the source
    without the unreadable images (--on-bad-image skip), which have no row.

    ``transform``: PIL RGB -> uint8 tensor, described by its str(); default: the paper's for mining and k-NN.
    """
    kept = None if network.file == networks.UNTRAINED else network.identity  # without a file, no identity
    return networks.features_of(network.encoder, source, args, process, label, kept, transform,
                                open_output(args) / "features", args.feature_batch)


def settings(args: cli.Arguments) -> dict[str, Any]:
    """The flags that affect a result, except those of the network and the data, which the record holds elsewhere."""
    elsewhere = {"command", *declared(networks.Network), *declared(load_frozen), "image_size", "data"}
    elsewhere |= {name for name, found in args.declared.items()
                  if found.setting.resumable and not found.setting.changes_numbers}
    if getattr(args, "on_bad_image", "error") == "error":  # a larger image has ended the command
        elsewhere.add("max_pixels")
    return {name: value for name, value in sorted(vars(args).items()) if name not in elsewhere}


def finish(command: str, args: argparse.Namespace, process: Process, nets: Sequence[Network],
           data: Mapping[str, ImageSource], metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] | None = None,
           title: str | None = None, **more: Any) -> dict[str, Any]:
    """Write a result: a line of results.jsonl, COMMAND.md in --output, and the table on the screen. Returns the record.

    ``metrics``: plain numbers by name, possibly nested; `evaluate.py all` and --compare read them. ``rows``: the table,
    by default one row of the metrics. ``data``: the scored sources by role. ``more``: further entries of the record.
    """
    rows = [dict(metrics)] if rows is None else rows
    record = {"command": command, **(nets[0].record() if len(nets) == 1 else
                                     {"networks": [net.record() for net in nets]}),
              "data": args.data,
              "sources": {role: {"title": source.title, "images": len(source), "classes": len(source.classes),
                                 "left_out": len(source.left_out), "fingerprint": source.fingerprint()}
                          for role, source in data.items()},
              "settings": settings(args), "metrics": dict(metrics),
              "table": [dict(row) for row in rows], **more, "versions": versions(),
              "processes": process.world_size, "device": str(process.device)}
    if process.is_main:
        folder = open_output(args)
        add_result(folder, record)
        save_table(folder / f"{command}.md", rows)
        what = ", ".join(f"{len(source):,} {role}" for role, source in data.items())
        print(title or f"{command}: {what} images")
        print(table(rows))
        notes = {of_one_class(source.classes) for source in data.values()} if command not in UNLABELLED else set()
        for note in filter(None, notes):
            print(note)
    return record


def missing(name: str, folder: Path | str, holds: str, where: str) -> UserError:
    """The error for a missing data set: what was expected, and where to get it."""
    return UserError(f"{name} was not found: {folder} should hold {holds}; get it from {where}, under its own terms")
