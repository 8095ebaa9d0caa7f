"""What students and their teacher have in common."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.reader import read_checkpoint
from common import cli, evaluation, networks
from data.datasets import open_source
from evals.overlap import KS, neighbourhoods, similarity, usable_ks
from evals.overlap_picture import save_picture
from models.heads import width_of
from runtime.agreement import together
from runtime.device import Process
from runtime.errors import UserError
from runtime.outputs import check_output_file

HELP = "what students have in common with their teacher: neighbours, CKA, space similarity; no labels"
DATA = ("images that were not trained on: an image folder, a packed file, a .txt file of paths, or a name; in a folder "
        "that holds train/ and val/ or test/, the latter is used. Labels are ignored")
ROWS = 8192  # features per pass through a head


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    evaluation.add_common_flags(parser, data=DATA, several=True,
                            share_of="each class's images (of all, where they have no labels); default 1")
    group = parser.add_argument_group("overlap")
    evaluation.add_teacher_flags(group)
    group.add_argument("--k", type=cli.number(int, 1), nargs="+", default=None, metavar="K",
                       help="sizes of neighbourhoods; default " + " ".join(map(str, KS)) + ", those below half of the "
                            "images")
    group.add_argument("--picture", default=None, metavar="PNG",
                       help="file for the bar charts; default: overlap.png in --output if matplotlib is installed; "
                            "'none' for no picture")


def in_all(args: argparse.Namespace) -> evaluation.Steps:
    """What `evaluate.py all` with ``args`` runs of it."""
    own = ["--teacher", str(args.teacher), *evaluation.WHOLE]
    return [("overlap", evaluation.on_data(args, *own, needs=["teacher"]))]


def run(args: argparse.Namespace, process: Process) -> dict[str, Any]:
    """Measure how much of the teacher's space each student has, on images that neither was trained on: the percentage
    of shared nearest neighbours, trustworthiness and continuity (Venna and Kaski), linear CKA (Kornblith et al.),
    effective rank, and, if the student's head maps to the teacher's width, the cosine of rows and of columns (the
    paper's space similarity) and the correlation of columns. Neighbours use the cosine of trunk features and exclude
    the image itself."""
    with together(process):
        folder = evaluation.open_output(args)
        if args.picture and args.picture != "none":
            check_output_file(Path(args.picture), "--picture", [".png"], [*args.weights, args.teacher])
        source = open_source(args.data, "test").subset(args.subset)
        ks = _ks(args.k, len(source))
        names = evaluation.student_names(args.weights, args.names)
        # Open all networks first, so that a bad file is refused at once.
        heads = {file: heads_of(file, args.branch, args) for file in args.weights}
        flags = {file: students_args(args, file) for file in args.weights}
        students = {name: evaluation.open_network(flags[file], process, file)
                    for name, file in zip(names, args.weights, strict=True)}
        own = evaluation.teacher_args(args)
        teacher = evaluation.open_network(own, process, args.teacher, "--teacher")
    space, source = evaluation.features(teacher, source, own, process, "teacher's features")
    ks = _ks(args.k, len(source))  # of the images that could be opened
    own_heads = heads_of(args.teacher, args.teacher_branch, args)
    found, compared, nets = {}, {}, [teacher]
    for name, file in zip(names, args.weights, strict=True):
        student = students[name]
        features, _ = evaluation.features(student, source, flags[file], process, f"features of {name}")
        target, projected, how = common_space(space, features, own_heads, heads[file])
        found[name] = {**neighbourhoods(space, features, ks, process, process.is_main),
                       **similarity(space, features, projected, process, target)}
        compared[name] = how
        nets.append(student)
    chance = {k: 100 * k / (len(source) - 1) for k in ks}
    on = f"on {len(source):,} images of {source.title}"
    record = evaluation.finish("overlap", args, process, nets, {"held-out": source}, found,
                               [{**_row(name, x, ks), "compared": compared[name]} for name, x in found.items()],
                               f"overlap with the teacher {on}; shared neighbours in %", compared=compared,
                               chance=chance)
    if process.is_main and args.picture != "none":
        _picture(args, folder, found, chance, f"overlap with {args.teacher}, {teacher.spec.arch}, {on}")
    return record


def students_args(args: argparse.Namespace, file: str) -> argparse.Namespace:
    """The flags of one student. Of several files, --arch belongs to those that do not tell theirs; if there is an
    untrained network, --stem belongs to it alone."""
    if file == networks.UNTRAINED or len(args.weights) == 1:
        return args
    own = evaluation.changed(args, stem=None if networks.UNTRAINED in args.weights else args.stem)
    try:
        read_checkpoint(file, args.checkpoint_key, branch=args.branch, trust=args.trust_checkpoint).identify()
    except UserError:
        return own
    return evaluation.changed(own, arch=None)


def common_space(teacher: Tensor, student: Tensor, teacher_heads: Sequence[nn.Module], heads: Sequence[nn.Module],
                 ) -> tuple[Tensor | None, Tensor | None, str]:
    """Teacher and student features of one width, from trunk features [n, d_t] and [n, d_s], and their source in words.

    After the student's head if it maps to the teacher's trunk (CoSS, SMD); after both heads if it maps to the teacher's
    head (SEED, BINGO, DisCo); the trunk features if their widths agree; otherwise None.
    """
    heads = [head for head in heads if width_into(head) == student.shape[1]]
    for head in heads:
        if width_of(head, student.shape[1]) == teacher.shape[1]:
            return teacher, through(head, student), "student's head, teacher's trunk"
    for own, head in itertools.product(teacher_heads, heads):
        if width_into(own) == teacher.shape[1] and width_of(own, 0) == width_of(head, 0):
            return through(own, teacher), through(head, student), "both heads"
    if student.shape[1] == teacher.shape[1]:
        return teacher, student, "both trunks"
    return None, None, "no common width"


def width_into(head: nn.Module) -> int | None:
    """The input width of a head; None without a linear layer."""
    return next((layer.in_features for layer in head.modules() if isinstance(layer, nn.Linear)), None)


def heads_of(file: str, branch: str | None, args: argparse.Namespace) -> list[nn.Module]:
    """The heads of a known kind in a checkpoint."""
    if file == networks.UNTRAINED:
        return []
    checkpoint = read_checkpoint(file, args.checkpoint_key, branch=branch, trust=args.trust_checkpoint)
    return [head.eval() for head in checkpoint.heads()]


@torch.inference_mode()
def through(head: nn.Module, features: Tensor) -> Tensor:
    """``head`` of features [n, d], on the CPU."""
    return torch.cat([head(features[first:first + ROWS].float().clone())
                      for first in range(0, len(features), ROWS)])


def _ks(given: Sequence[int] | None, images: int) -> list[int]:
    ks = usable_ks(images, given or KS)
    if images < 4 or (given and len(ks) < len(set(given))) or not ks:
        raise UserError(f"--k {' '.join(map(str, given or KS[:1]))} of {images} images: neighbourhoods must hold fewer "
                        "than half of the images; give smaller ones, or more images")
    return ks


def _row(name: str, found: dict[str, Any], ks: Sequence[int]) -> dict[str, Any]:
    middle = min(ks, key=lambda k: abs(k - 11))
    return {"student": name, **{f"k={k}": found["shared"][k] for k in ks},
            f"trust. k={middle}": found["trustworthiness"][middle], f"cont. k={middle}": found["continuity"][middle],
            "CKA": found["cka"], "unbiased": found["cka_unbiased"], "row cos.": found["row_cosine"],
            "column cos.": found["space_cosine"], "column corr.": found["dimension_correlation"],
            "eff. rank": found["effective_rank"], "teacher's": found["teacher_effective_rank"]}


def _picture(args: argparse.Namespace, folder: Path, found: dict[str, Any], chance: dict[int, float], title: str,
             ) -> None:
    try:
        print(f"picture: {save_picture(Path(args.picture or folder / 'overlap.png'), found, chance, title)}")
    except UserError as error:
        if args.picture:
            raise
        print(f"no picture: {error}")
