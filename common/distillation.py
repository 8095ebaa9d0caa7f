"""The two networks of a distillation: their flags, loading the teacher, and building the student."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from checkpoints.by_name import NAME_HELP, look_at_weights
from checkpoints.frozen import load_frozen
from checkpoints.report import Report
from common import cli
from common.training_data import TrainingData
from data.augment import Augmentation, augmentation
from data.batches import BadImageLog, Batch
from data.epoch_length import FixedLengthEpochs
from data.loader import build_loader
from data.samplers import RandomSampler
from losses import needs_of
from losses.base import CombinedNeeds
from losses.combine import Objective
from models import head_init
from models.backbones import ARCH_HELP, build_backbone, check_arch
from models.distiller import Distiller
from models.heads import Heads, build_heads
from models.place import place
from models.teachers import FrozenEncoder
from runtime.device import Process, need_memory
from runtime.micro_batches import buffers_put_back


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of student and teacher."""
    group = parser.add_argument_group("networks")
    group.add_argument("-a", "--student_arch", "--student-arch", default="resnet18", metavar="ARCH",
                       help=f"the student: {ARCH_HELP}; default resnet18, the paper's first row, or that of "
                            "--student-weights")
    group.add_argument("-k", "--teacher_arch", "--teacher-arch", default="auto", metavar="ARCH",
                       help="the teacher, as for --student_arch; default auto: determined from its file's tensors")
    cli.check_by(group, "--student_arch", check_arch)
    cli.check_by(group, "--teacher_arch", lambda arch, flag: arch == "auto" or check_arch(arch, flag))
    cli.stem_flag(group, "--stem --student-stem", whose="the student", unset="imagenet, or --student-weights' own")
    group.add_argument("--student-weights", default=None, metavar="PATH",
                       help="checkpoint, read like --distill, whose trunk and input normalisation the student starts "
                            "from, with a new head; default: random weights")
    group.add_argument("--distill", default=None, metavar="PATH",
                       help=f"the teacher's checkpoint, of any layout that docs/CHECKPOINTS.md lists, {NAME_HELP}; "
                            "missing and unexpected keys of the trunk are refused. Only losses with a teacher need it")
    cli.check_by(group, "--student-weights --distill", look_at_weights)
    cli.add_network_flags(group, "--teacher-")
    group.add_argument("--teacher-image-size", type=cli.number(int, 8, 8192), default=None, metavar="S",
                       help="side of the teacher's square input, in pixels; both networks get the same crop with the "
                            "same colours, each at its own size; default: --image-size, or what its file records")
    cli.only(group, "--teacher_arch --teacher-image-size --teacher-stem --teacher-feature --teacher-branch "
                    "--teacher-mean --teacher-std",
             "with a loss that has a teacher", lambda args: bool(needs_of(args.loss).teacher))


def load_teacher(args: argparse.Namespace, needs: CombinedNeeds) -> tuple[FrozenEncoder | None, Report | None]:
    """The teacher that --distill names, with its own head if the loss needs that; None for losses without a teacher."""
    if not needs.teacher:
        return None, None
    arch = None if args.teacher_arch == "auto" else args.teacher_arch
    teacher, report = load_frozen(args.distill, arch, args.teacher_stem, args.teacher_image_size or args.image_size,
                                  flag="--distill", prefix="--teacher-", with_head="head" in needs.teacher,
                                  **cli.checkpoint_options(args))
    if args.teacher_bn == "train":
        teacher.use_batch_statistics()
    return teacher, report


def build_student(args: cli.Arguments, needs: CombinedNeeds, widths: Mapping[str | None, int], image_size: int,
                  process: Process) -> tuple[Distiller, Report | None]:
    """The student with trunk and heads, to be wrapped in DistributedDataParallel, and the report of the weights that it
    starts from (None: random weights)."""
    backbone, report, colours = student_trunk(args, image_size)
    need_memory(16 * backbone.spec.feature_dim * args.moco_dim, f"--moco-dim {args.moco_dim}")  # with a momentum copy
    head = build_heads(needs.heads, backbone.spec.feature_dim, widths, args.head_bn)
    return place(Distiller(backbone, head, *colours), process.device), report


def student_trunk(args: cli.Arguments, image_size: int) -> tuple[nn.Module, Report | None, tuple]:
    """The student's trunk, its report, and (mean, std), the last two only with --student-weights."""
    if not args.student_weights:
        return build_backbone(args.student_arch, args.stem or "imagenet", image_size, flag="--student_arch"), None, ()
    arch = args.student_arch if "student_arch" in args.given else None
    start, report = load_frozen(args.student_weights, arch, args.stem, image_size, flag="--student-weights",
                                prefix="--student-", trust_checkpoint=args.trust_checkpoint)
    return start.backbone.requires_grad_(True).train(), report, (start.mean, start.std)


def views_of(aug: str, image_size: int, teacher_size: int, needs: CombinedNeeds) -> list[Augmentation]:
    """The augmentation of each view of an image: of those that both networks see at both sizes."""
    if teacher_size == image_size:
        return [augmentation(aug, image_size)] * needs.views
    if needs.apart:
        return [augmentation(aug, image_size), *[augmentation(aug, teacher_size)] * (needs.views - 1)]
    return [augmentation(aug, image_size, teacher_size)] * needs.views


def chosen_start(head_init: str, loss: Objective) -> str:
    """--head-init, with its default decided: random or teacher."""
    return head_init if head_init != "auto" else "teacher" if loss.follows_rows else "random"


def start_head(args: argparse.Namespace, student: Distiller, teacher: FrozenEncoder, loss: Objective,
               data: TrainingData) -> list[str]:
    """--head-init, on the first images of a random order: the same in every process. Returns sentences for the log."""
    if chosen_start(args.head_init, loss) == "random" or all(name == "none" for name, _ in loss.needs.heads):
        return []
    source, bad_images = data.source, BadImageLog(data.source, args.on_bad_image)
    rows = min(head_init.AT_ONCE, len(source))
    sampler = FixedLengthEpochs(RandomSampler(len(source), rows, seed=args.seed), -(-head_init.IMAGES // rows))
    loader = build_loader(source, data.views, sampler, 0, args.seed, next(student.parameters()).device, args.data_path)
    images = head_around(student, teacher, loss, loader, bad_images.check)
    if images:
        return [f"the student's head starts with the mean and spread of the teacher's outputs, from {images} augmented "
                "images"]
    return ["--head-init teacher has no effect: no head of the student ends in a linear layer"] * (
        args.head_init == "teacher")


def head_around(student: Distiller, teacher: FrozenEncoder, loss: Objective, batches: Iterable[Batch],
                check: Callable[[Batch], None]) -> int:
    """Set the last layer of each head that is compared with the teacher so that its outputs for ``batches`` have the
    mean and the spread of the teacher's. Returns the number of images, 0 if none ends in a linear layer."""
    heads = student.proj_head.values() if isinstance(student.proj_head, Heads) else [student.proj_head]
    layers = {i: (layer, to) for i, (head, (_, to)) in enumerate(zip(heads, loss.needs.heads, strict=True))
              if to and (layer := head_init.last_linear(head))}
    if not layers:
        return 0
    outputs, targets = [], []
    with torch.no_grad(), buffers_put_back(student):  # these forward passes are not training steps
        for batch in batches:
            check(batch)
            inputs = loss.inputs(batch.views)
            outputs.append(student(*inputs.student[:1]))
            targets.append(dict(zip(loss.needs.teacher, teacher.targets(inputs.teacher[0], loss.needs.teacher),
                                    strict=True)))
    for i, (layer, to) in layers.items():
        head_init.match_teacher(layer, torch.cat([x[i] for x in outputs]), torch.cat([x[to] for x in targets]))
    return sum(len(x[0]) for x in outputs)


def ready(teacher: FrozenEncoder, process: Process) -> list[str]:
    """Move the teacher to its device in its fastest form; returns notes for the log."""
    folded = teacher.fold()
    place(teacher, process.device)
    return [f"{folded} of the teacher's batch norms were folded into its convolutions"] if folded else []
