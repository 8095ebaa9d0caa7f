#!/usr/bin/env python
"""Distil a frozen self-supervised teacher into a small student, without labels.

    python compute_knn.py mine --data DIR --arch resnet50 --weights moco.pth --output nn/ --k 384
    torchrun --nproc_per_node 4 train_distill.py --data DIR --distill moco.pth -k resnet50 -a resnet18 \\
        --sampler cf --closek-info nn/closek_info.npy --nearest-k 15 --total-k 31 -b 64 --output run/

Defaults are those of the paper's ResNet rows (CoSS, ECCV 2024). Started plainly it runs as one process; under
torchrun as many. The folder --output gets config.json, metrics.jsonl, log.txt, TensorBoard events,
checkpoint.pth (to go on from) and student.pth (to use).
"""

from __future__ import annotations

if __name__ == "__main__":
    from runtime.start import begin
    begin()

import argparse
from functools import partial

import torch

import losses
from checkpoints.frozen import load_frozen
from checkpoints.report import Report
from common import cli, cli_original, methods
from data.augment import PRESETS, augmentation
from data.cache import pooled
from data.checks import check_apart
from data.clusters import NO_CLUSTER, load_clusters
from data.datasets import open_source
from data.epoch_length import EpochsOf
from data.images import limit_pixels
from data.loader import BadImageLog, Batch, build_loader
from data.neighbours import KeptNeighbours, left_out_rows, load_neighbours, same_left_out
from data.samplers import ClusterNeighbourSampler, ClusterSampler, NeighbourSampler, RandomSampler
from data.sources import ImageSource
from data.whole_clusters import WholeClusterSampler
from evals.monitor import KnnMonitor
from losses import build_objective, needs_of
from losses.base import CombinedNeeds, Inputs
from models.average import MovingAverage
from models.backbones import build_backbone, check_arch, check_batch
from models.distiller import Distiller, agreement
from models.heads import build_heads
from models.momentum import MomentumStudent
from models.place import place
from models.teachers import Encoder, FrozenEncoder
from runtime.device import Process, need_memory, seed_everything, start_process, wrap
from runtime.errors import UserError, run_script
from runtime.hardware import Hardware
from runtime.loop import Trainer
from runtime.micro_batches import in_parts, parts_of
from runtime.optim import Updater
from runtime.optimizers import Optimization
from runtime.run import Run

SAMPLERS = {"random": set(), "cf": {"closek_info", "fark_info"}, "cluster": {"cluster_info"},
            "cluster+cf": {"closek_info", "fark_info", "cluster_info"}}  # --sampler -> the files that it reads
DERIVED = {"processes", "teacher"}  # in config.json beside the flags, and free to differ when a run resumes
FILES = {"distill", *SAMPLERS["cluster+cf"]}  # may lie elsewhere when a run goes on: what they hold is checked


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    cli.add_view_flags(cli.add_data_flags(parser))

    group = parser.add_argument_group("networks")
    group.add_argument("-a", "--student_arch", "--student-arch", default="resnet18", metavar="ARCH",
                       help="student, a torchvision classifier by name, a small ViT (vit_ti_16, vit_s_16), or "
                            "timm:NAME; default resnet18, the paper's first row")
    group.add_argument("-k", "--teacher_arch", "--teacher-arch", default="auto", metavar="ARCH",
                       help="teacher, a torchvision classifier by name, or timm:NAME; default auto: found from its "
                            "file's tensors")
    cli.stem_flag(group, "--stem", whose="the student", unset="imagenet")
    group.add_argument("--distill", default=None, metavar="PATH",
                       help="the teacher's checkpoint, of any layout that docs/CHECKPOINTS.md lists; every tensor of "
                            "the trunk must be filled and none may be left over. Losses without a teacher need none")
    cli.add_network_flags(group, "--teacher-")

    methods.add_loss_flags(parser)

    group = parser.add_argument_group("batches")
    group.add_argument("--aug", choices=sorted(PRESETS), default="moco_v2",
                       help="augmentation; default moco_v2, the paper's")
    group.add_argument("--sampler", choices=sorted(SAMPLERS), default="cf",
                       help="cf (default, the paper's): each anchor with its neighbours from --closek-info; random: "
                            "each image once an epoch, no file; cluster: each image once, each step out of one k-means "
                            "cluster of --cluster-info, or, where --closek-info is given a cluster file instead, each "
                            "step of a process a whole cluster, as in the original; cluster+cf: anchors from the "
                            "clusters in turn, each with its neighbours, until most images were seen")
    group.add_argument("-b", "--batch-size", type=cli.number(int, 1), default=64, metavar="N",
                       help="anchors of a step over all processes; default 64, the paper's (on 4 GPUs with 15 "
                            "neighbours each: 256 images a GPU)")
    group.add_argument("--closek-info", metavar="FILE",
                       help="neighbour file of compute_knn.py mine (or of the original code), for --sampler cf and "
                            "cluster+cf; with --sampler cluster a cluster file, whose clusters are steps")
    group.add_argument("--fark-info", metavar="FILE", default=None,
                       help="file of the farthest images, of compute_knn.py mine --far: half of --nearest-k (rounded "
                            "down) are then far ones; default: none")
    group.add_argument("--cluster-info", metavar="FILE",
                       help="cluster file of compute_knn.py cluster (or of the original code), for --sampler cluster "
                            "and cluster+cf")
    group.add_argument("--coverage", type=cli.number(float, above=0, most=1), default=0.95, metavar="X",
                       help="with cluster+cf: an epoch ends when this share of the images was seen; default 0.95, the "
                            "original's")
    group.add_argument("--nearest-k", type=cli.number(int, 0), default=15, metavar="N",
                       help="neighbours that an anchor brings; default 15, the paper's")
    group.add_argument("--total-k", type=cli.number(int, 0), default=31, metavar="N",
                       help="nearest neighbours out of which they are drawn; default 31, the paper's; equal to "
                            "--nearest-k takes exactly the nearest")
    near, clusters = ("cf", "cluster+cf"), ("cluster", "cluster+cf")
    cli.only(group, "--fark-info --nearest-k --total-k", "with --sampler cf and cluster+cf",
             lambda args: args.sampler in near)
    cli.only(group, "--closek-info", "with --sampler cf and cluster+cf, and with cluster where it holds the clusters",
             lambda args: args.sampler in near or whole_clusters(args))
    cli.only(group, "--cluster-info", "with --sampler cluster and cluster+cf", lambda args: args.sampler in clusters)
    cli.only(group, "--coverage", "with --sampler cluster+cf", lambda args: args.sampler == "cluster+cf")
    group.add_argument("--epoch-steps", type=cli.number(int, 1), default=None, metavar="N",
                       help="call N steps an epoch, for the schedule, the scores and the checkpoints, so that methods "
                            "with different samplers can be compared at equal places; images come in the same order. "
                            "Default: the sampler's own epochs")

    group = cli.add_optimization_flags(parser, source="the paper's")
    group.add_argument("--ema", type=cli.number(float, 0, below=1), default=0.0, metavar="X",
                       help="keep a moving average of the student with this decay (0.999, 0.9999) and write it to "
                            "student_ema.pth; default 0, none")
    group = cli.add_speed_flags(parser)
    group.add_argument("--micro-batch", type=cli.number(int, 0), default=0, metavar="M",
                       help="images of a process that pass through the networks at once, for batches greater than its "
                            "memory: the student passes twice, and the gradient is that of the whole batch, for every "
                            "loss. Only batch norm differs, whose statistics are then those of M images (of a view), "
                            "as if the batch had been M; default 0, all at once")
    group = cli.add_run_flags(parser)
    cli.add_knn_flags(group)
    cli.add_device_flags(parser)
    return parser.parse_args(cli_original.translate("train_distill.py", argv))


def distil(args: argparse.Namespace, process: Process) -> None:
    """Data, models, loss, optimizer, resume, loop."""
    check_flags(args)
    hardware, optimization = cli.take(Hardware, args), cli.take(Optimization, args)
    hardware.prepare(process)
    seed_everything(args.seed)
    needs = needs_of(args.loss)
    check_apart(args.output, args.data)
    source = open_source(args.data).subset(args.subset)
    teacher, report = load_teacher(args, needs) if needs.teacher else (None, None)
    teacher_spec = teacher.backbone.spec if teacher else None
    image_size = teacher_spec.image_size if teacher else args.image_size or 224
    sampler, source, notes = build_sampler(args, process, source, report.sha256 if report else None)
    source = pooled(source, args.image_cache, args.cache)
    sampler = EpochsOf(sampler, args.epoch_steps) if args.epoch_steps else sampler
    views = [augmentation(args.aug, image_size)] * needs.views
    loader = build_loader(source, views, sampler, args.workers, args.seed, process.device, args.data_path, args.cache)
    bad_images = BadImageLog(source, args.on_bad_image)

    # The student, trunk and head, and nothing else, goes inside DistributedDataParallel.
    backbone = build_backbone(args.student_arch, args.stem or "imagenet", image_size, "--student_arch")
    widths = {None: args.moco_dim, **(teacher.widths() if teacher else {})}  # by what outputs are compared with
    need_memory(16 * backbone.spec.feature_dim * args.moco_dim, f"--moco-dim {args.moco_dim}")  # a momentum copy too
    head = build_heads(needs.heads, backbone.spec.feature_dim, widths, args.head_bn)
    shown = next((i for i, (_, to) in enumerate(needs.heads) if to), 0)  # whose output the log holds to the teacher's
    student = place(Distiller(backbone, head), process.device)
    rows = sampler.images_per_step // (2 if needs.pairs else 1)
    parts = parts_of(rows, args.micro_batch)
    for network in (student, *([teacher] if teacher and args.teacher_bn == "train" else [])):
        check_batch(network, rows // parts, "--micro-batch" if parts > 1 else
                    "a cluster of --closek-info" if whole_clusters(args) else "--batch-size")
    momentum = (MomentumStudent(student, args.moco_m, max(args.bn_parts, parts * process.world_size))
                if needs.momentum else None)
    average = MovingAverage(student, args.ema) if args.ema else None
    student = hardware.synchronised(student, process)
    if teacher:
        if folded := teacher.fold():
            notes.append(f"{folded} of the teacher's batch norms were folded into its convolutions")
        teacher = place(teacher, process.device)
    loss = build_objective(args.loss, args.loss_weights, args.beta, widths, student_dim=backbone.spec.feature_dim,
                           **methods.options(args)).to(process.device)
    updater = Updater(optimization.build(student), process.device, args.amp,
                      args.clip_grad, partial(average.update, student) if average else None)
    knn = (KnnMonitor.open(args.data, args.knn_data, image_size, args.workers, process, args.on_bad_image)
           if args.knn_every else None)

    config = {**vars(args), "losses": {name: dict(x.settings) for name, x in loss.losses.items()},
              "stem": backbone.spec.stem, "image_size": image_size,
              "teacher_arch": teacher_spec.arch if teacher else None,
              "teacher_stem": teacher_spec.stem if teacher else None, "teacher": report.record() if report else None,
              "teacher_sha256": report.sha256 if report else None, "data_fingerprint": source.fingerprint(),
              "far_k": sampler.far_k, "num_clusters": sampler.num_clusters,
              "whole_clusters": whole_clusters(args), "processes": process.world_size}
    record = {**student.record(), "teacher": config["teacher"]}
    modules = {"state_dict": student, "updater": updater,
               **({"loss": loss} if loss.state_dict() else {}), **({"momentum": momentum} if momentum else {}),
               **({"ema": average} if average else {})}
    networks = {"student.pth": student, **({"student_ema.pth": average.network} if average else {})}
    run = Run.open(config=config, record=record, volatile=args.resumable | DERIVED | FILES | losses.settings().keys(),
                   process=process,
                   modules=modules, exports=networks,
                   per_process=f"--loss {args.loss} is taken over the batch of each" if loss.per_process else "",
                   **cli.run_options(args))
    for line in (cli.ignored_flags_note(args), f"data: {source.description}", f"teacher: {report or 'none'}", *notes,
                 *cli.unused(args, methods.SURROUNDINGS), *methods.unused(args, head),
                 f"student: {args.student_arch}, {args.epochs} epochs of {len(sampler)} steps of "
                 f"{sampler.global_images_per_step} images on {process.world_size} x {process.device.type}, "
                 f"--amp {updater.amp}"):
        if line:
            run.log.say(line)
    if teacher:
        teacher.round(updater.dtype)
    if args.compile:
        for network in filter(None, (student, teacher, momentum and momentum.network)):
            network.compile()
    model = wrap(student, process)
    forward = updater.in_micro_batches(model, args.micro_batch)
    answers = in_parts(lambda images: teacher.answers(images, needs.teacher), args.micro_batch)
    run.restore_own_state(args.seed)

    @torch.no_grad()
    def targets_of(inputs: Inputs) -> dict[str, tuple[torch.Tensor, ...]]:
        """What the student is held against, without gradient, [b, d] each."""
        found = {"teacher": tuple(y for x in inputs.teacher for y in answers(x))}
        if momentum:
            momentum.update(student)
            found["momentum"] = tuple(y for x in inputs.momentum for y in momentum(x))
        return found

    def step(batch: Batch) -> dict[str, torch.Tensor]:
        inputs = loss.inputs(batch.views)                  # uint8 [b, 3, S, S] each, on the device
        targets = targets_of(inputs)
        outputs = forward(*inputs.student)                 # [b, d] each
        parts = loss(student=outputs, **targets, **inputs.context)
        return {**parts, "student": outputs[shown].detach(), **{name: x[0] for name, x in targets.items() if x}}

    trainer = Trainer(run, updater, loader, sampler.global_images_per_step, args.epochs, optimization.rate,
                      args.print_freq, bad_images.check,
                      monitor=lambda parts: agreement(parts["student"], parts.get("teacher")))
    for epoch in range(run.epoch, args.epochs):
        sampler.set_epoch(epoch, run.step)
        loss.set_epoch(epoch)
        model.train()
        trainer.epoch(epoch, step)
        top1 = (run.scored(lambda: knn.score(Encoder(backbone).to(process.device)))
                if knn and knn.is_due(epoch + 1, args.knn_every, args.epochs) else None)
        run.log.scalars(run.steps, epoch, sampler.statistics.scalars(), "sampler")
        run.log.say(f"epoch {epoch + 1}: {sampler.statistics}")
        if top1 is not None:
            run.note(epoch, "knn", {"top1": top1}, knn.description)
        run.save(epoch, {name: network.student_state() for name, network in networks.items()})
    run.finish(bad_images.summary() if bad_images.counts else "")


def check_flags(args: argparse.Namespace) -> None:
    """What can be said of the command line alone, before anything is read."""
    cli.take(Optimization, args).check()
    check_arch(args.student_arch, "--student_arch")
    methods.check_loss(args)
    needs = SAMPLERS[args.sampler]
    if "closek_info" in needs and not args.closek_info:
        raise UserError(f"--sampler {args.sampler} needs --closek-info FILE, the neighbours of --data in the teacher's "
                        "space; make it with compute_knn.py mine, or take --sampler random")
    if whole_clusters(args):
        check_whole_clusters(args)
    elif "cluster_info" in needs and not args.cluster_info:
        raise UserError(f"--sampler {args.sampler} needs --cluster-info FILE, the clusters of --data in the teacher's "
                        "space; make it with compute_knn.py cluster, or take --sampler cf or random")
    if "closek_info" in needs and args.nearest_k > args.total_k:
        raise UserError(f"--nearest-k {args.nearest_k} is more than --total-k {args.total_k}, out of which it is "
                        "drawn; lower the first or raise the second")


def whole_clusters(args: argparse.Namespace) -> bool:
    """Whether the command line is the original's for --sampler cluster, whose clusters came from --closek-info."""
    return args.sampler == "cluster" and bool(args.closek_info) and not args.cluster_info


def check_whole_clusters(args: argparse.Namespace) -> None:
    """Steps of any size go with losses of each process's own batch."""
    taken = losses.settings(args.loss.split("+"))
    gathers = needs_of(args.loss).momentum or {"queue_size", "smd_batch"} & taken.keys()
    for flag, given in (("--micro-batch", args.micro_batch), ("--epoch-steps", args.epoch_steps),
                        (f"--loss {args.loss}", gathers)):
        if given:
            raise UserError(f"{flag} needs steps of one size, and --sampler cluster with clusters in --closek-info "
                            "makes each a whole cluster; give the clusters as --cluster-info, and steps have -b images")


def load_teacher(args: argparse.Namespace, needs: CombinedNeeds) -> tuple[FrozenEncoder, Report]:
    """The teacher that --distill names, with its own head if the loss asks for it."""
    arch = None if args.teacher_arch == "auto" else args.teacher_arch
    teacher, report = load_frozen(args.distill, arch, args.teacher_stem, args.image_size, flag="--distill",
                                  prefix="--teacher-", with_head="head" in needs.teacher,
                                  **cli.checkpoint_options(args))
    if args.teacher_bn == "train":
        teacher.use_batch_statistics()
    return teacher, report


def build_sampler(args: argparse.Namespace, process: Process, source: ImageSource, teacher_sha256: str | None,
                  ) -> tuple[RandomSampler, ImageSource, list[str]]:
    """The sampler that --sampler names, its images, and what is to be said about its files. Images that could not be
    opened when the files were made are left out."""
    needs, data, gone = SAMPLERS[args.sampler], (source.fingerprint(), len(source)), {}
    neighbours = far = labels = None
    whole = whole_clusters(args)
    if whole:
        needs = {"closek_info"}
    notes: list[str] = []
    where = {"batch_size": args.batch_size, "rank": process.rank, "world_size": process.world_size, "seed": args.seed}
    if whole:
        labels, more = load_clusters(args.closek_info, *data, teacher_sha256, flag="--closek-info")
        notes += [*more, "each step of a process is a whole cluster of --closek-info; -b is not used"]
        gone["--closek-info"] = (labels == NO_CLUSTER).nonzero()[0]
    elif "closek_info" in needs:
        neighbours, more = load_neighbours(args.closek_info, *data, args.total_k, teacher_sha256)
        notes += more
        gone["--closek-info"] = left_out_rows(neighbours)
        if args.fark_info:
            far, more = load_neighbours(args.fark_info, *data, args.total_k, teacher_sha256, flag="--fark-info")
            notes += more
            gone["--fark-info"] = left_out_rows(far)
        where |= {"nearest_k": args.nearest_k, "total_k": args.total_k}
    if "cluster_info" in needs:
        labels, more = load_clusters(args.cluster_info, *data, teacher_sha256)
        notes += more
        gone["--cluster-info"] = (labels == NO_CLUSTER).nonzero()[0]
    if gone and len(images := same_left_out(gone)):
        notes.append(f"{len(images):,} images that could not be opened when {' and '.join(gone)} was made are left out")
        source = source.without(images)
        labels = None if labels is None else labels[source.kept]
        neighbours, far = (table if table is None else KeptNeighbours(table, source.kept)
                           for table in (neighbours, far))
    if args.sampler == "cluster+cf":
        return ClusterNeighbourSampler(neighbours, labels, far=far, coverage=args.coverage, **where), source, notes
    if whole:
        return WholeClusterSampler(labels, process.rank, process.world_size, args.seed), source, notes
    if args.sampler == "cluster":
        return ClusterSampler(labels, **where), source, notes
    if args.sampler == "cf":
        return NeighbourSampler(neighbours, far=far, **where), source, notes
    return RandomSampler(len(source), **where), source, notes


def main() -> None:
    args = parse_args()
    limit_pixels(args.max_pixels)
    with start_process(args.device) as process:
        cli.same_flags(args, process)
        distil(args, process)


if __name__ == "__main__":
    run_script(main, less_memory="pass a batch through in parts by --micro-batch (64, or lower than it was), or lower "
                                 "--batch-size or --nearest-k")
