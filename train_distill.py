#!/usr/bin/env python
"""Distil a frozen self-supervised teacher into a small student, without labels.

    python compute_knn.py mine --data DIR --arch resnet50 --weights moco.pth --output nn/ --k 384
    torchrun --nproc_per_node 4 train_distill.py --data DIR --distill moco.pth -k resnet50 -a resnet18 \\
        --sampler cf --closek-info nn/closek_info.npy --nearest-k 15 --total-k 31 -b 64 --output run/

Defaults are those of the paper's ResNet rows (CoSS, ECCV 2024). Without torchrun it runs as one process. The folder
--output gets config.json, metrics.jsonl, log.txt, TensorBoard events, checkpoint.pth (to resume from), student.pth
and student_trunk.pth (to use).
"""

from __future__ import annotations

if __name__ == "__main__":
    from runtime.start import begin
    begin(__file__)

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from checkpoints.report import Report
from common import afterwards, cli, cli_original, distillation, methods, sampling
from common.first_step import check_step, long_queue, small_images
from data.cache import pooled
from data.checks import check_apart
from data.datasets import open_source
from data.images import limit_pixels
from data.loader import BadImageLog, Batch, build_loader
from data.samplers import RandomSampler
from data.sources import ImageSource
from evals.monitor import KnnMonitor
from losses import build_objective, needs_of
from losses.base import CombinedNeeds, Inputs
from losses.combine import Objective
from models.backbones import check_arch, check_batch
from models.distiller import Distiller, agreement
from models.momentum import MomentumStudent, MovingAverage
from models.original import of_the_paper
from models.teachers import FrozenEncoder
from runtime.agreement import together
from runtime.device import Process, seed_everything, start_process, wrap
from runtime.errors import run_script
from runtime.hardware import Hardware
from runtime.job import RunSettings
from runtime.loop import Trainer
from runtime.micro_batches import in_parts, parts_of
from runtime.optim import Updater
from runtime.optimizers import Optimization
from runtime.own import code_record
from runtime.run import Description, Run
from runtime.settings import add_settings
from runtime.watch import GrowthWatch

LESS_MEMORY = ("split the batch with --micro-batch (64, or less than now), or lower --batch-size or "
               "--nearest-k")
# Entries of config.json that may differ when a run resumes, beside the settings declared as resumable: files of weights
# may have moved (their content is compared). The settings of --loss are compared as "losses", with their defaults.
FREE = {"processes", "teacher", "distill", "student_weights"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    words = cli_original.translate("train_distill.py", argv)
    cli.add_view_flags(cli.add_data_flags(parser))

    distillation.add_flags(parser)
    methods.add_loss_flags(parser)

    sampling.add_batch_flags(parser)
    add_settings(cli.add_optimization_flags(parser, source="the paper's"), MovingAverage, ema=0.0)
    group = cli.add_speed_flags(parser)
    add_settings(group, parts_of)
    group = cli.add_run_flags(parser)
    cli.add_knn_flags(group)
    cli.add_device_flags(parser)
    methods.add_own_flags(parser, words)
    return parser.parse_args(words)


def distil(args: argparse.Namespace, process: Process) -> None:
    """The experiment: data, teacher, student, loss, optimizer, run, loop."""
    with together(process):
        check_flags(args)
        hardware, optimization = cli.take(Hardware, args), cli.take(Optimization, args)
        hardware.prepare(process)
        seed_everything(args.seed)
        needs = needs_of(args.loss)
        check_apart(args.output, args.data)
        source = open_source(args.data).subset(args.subset)
        teacher, report = distillation.load_teacher(args, needs) if needs.teacher else (None, None)
        teacher_size = teacher.backbone.spec.image_size if teacher else None
        image_size = args.image_size or teacher_size or 224
        sampler, source, notes = sampling.open_sampler(args, process, source, report and {
            "teacher_sha256": report.sha256, "feature": report.feature, "image_size": report.image_size})
        small, size_flags = small_images(source, image_size)
        source = pooled(source, args.image_cache, args.cache)
        views = distillation.views_of(args.aug, image_size, teacher_size or image_size, needs)
        loader = build_loader(source, views, sampler, args.workers, args.seed, process.device, args.data_path,
                              args.cache)
        bad_images = BadImageLog(source, args.on_bad_image)

        widths = {None: args.moco_dim, **(teacher.widths() if teacher else {})}  # of each target of the student
        student, begun = distillation.build_student(args, needs, widths, image_size, process)
        parts = micro_batches(args, needs, sampler, student, teacher)
        notes += [f"the student starts from {begun}"] * bool(begun)
        loss = build_objective(args.loss, args.loss_weights, args.beta, widths, **methods.options(args),
                               student_dim=student.backbone.spec.feature_dim).to(process.device)
        if teacher:
            notes += distillation.ready(teacher, process)
            notes += distillation.start_head(args, student, teacher, loss, source, views, sampler.images_per_step)
        momentum = (MomentumStudent(student, args.moco_m, max(args.bn_parts, parts * process.world_size))
                    if needs.momentum else None)
        average = MovingAverage(student, args.ema) if args.ema else None
        student = hardware.synchronised(student, process)
        updater = Updater(optimization.build(student), process.device, args.amp, args.clip_grad,
                          partial(average.update, student) if average else None)
        notes += check_step(lambda images: pass_of(images, loss, student, needs, teacher, momentum),
                            [x for x in (student, teacher, momentum) if x], views, sampler.images_per_step,
                            -(-sampler.images_per_step // parts), updater, args.workers, process, LESS_MEMORY,
                            4 if needs.pairs else 2)
        notes += [f"{small}; {size_flags} takes far less time and memory (with --teacher-image-size {image_size} if "
                  "the teacher needs it)" if small else "", long_queue(loss, len(source), "--queue-size")]
        knn = (KnnMonitor.open(args.data, args.knn_data, image_size, args.workers, process, args.on_bad_image)
               if args.knn_every else None)

    exports = {"student.pth": student, **({"student_ema.pth": average.network} if average else {})}
    what = describe(args, process, source, sampler, report, teacher, begun, student, loss,
                    {"state_dict": student, "updater": updater, "momentum": momentum, "ema": average}, exports,
                    knn.fingerprints() if knn else {})
    run = Run.open(cli.take(RunSettings, args), what, process, args.seed, args.start_epoch)
    say_plan(run, args, source, sampler, report, student, updater, notes)
    if teacher:
        teacher.round(updater.dtype)
    if args.compile:
        for network in filter(None, (student, teacher, momentum and momentum.network)):
            network.compile()
    model = wrap(student, process)
    step = step_of(loss, updater.in_micro_batches(model, args.micro_batch), student, needs, teacher, momentum,
                   args.micro_batch)
    trainer = Trainer(run, updater, loader, sampler.global_images_per_step, args.epochs, optimization.rate,
                      args.print_freq, bad_images.check,
                      monitor=lambda parts: agreement(parts["student"], parts.get("teacher")),
                      watch=GrowthWatch() if loss.follows_rows and not run.steps else None)
    for epoch in range(run.epoch, args.epochs):
        sampler.set_epoch(epoch, run.step)
        loss.set_epoch(epoch)
        model.train()
        trainer.epoch(epoch, step)
        after_epoch(run, epoch, args, sampler, student, knn)
        run.save(epoch, {name: network.student_state() for name, network in exports.items()})
    arch = student.backbone.spec.arch
    run.finish(bad_images.summary() if bad_images.counts else "", uses=[
        *afterwards.write_trunks(run.output, exports, arch, process),
        *afterwards.use_student(run.output / "student.pth", args.data, args.distill if teacher else None, arch)])


def check_flags(args: argparse.Namespace) -> None:
    """Check what can be checked from the command line alone, before anything is read."""
    cli.take(Optimization, args).check()
    methods.check_loss(args)
    sampling.check_sampler(args)
    cli.check_files(args)
    check_arch(args.student_arch, "--student_arch")


def micro_batches(args: argparse.Namespace, needs: CombinedNeeds, sampler: RandomSampler, student: Distiller,
                  teacher: FrozenEncoder | None) -> int:
    """The number of parts into which --micro-batch splits a batch. Raises UserError if batch norm would get too few
    images."""
    rows = sampler.images_per_step // (2 if needs.pairs else 1)
    parts = parts_of(rows, args.micro_batch)
    for network in (student, *([teacher] if teacher and args.teacher_bn == "train" else [])):
        check_batch(network, rows // parts, "--micro-batch" if parts > 1 else
                    "a cluster of --closek-info" if sampling.chosen_sampler(args).uneven_steps else "--batch-size")
    return parts


def describe(args: argparse.Namespace, process: Process, source: ImageSource, sampler: RandomSampler,
             report: Report | None, teacher: FrozenEncoder | None, begun: Report | None, student: Distiller,
             loss: Objective, modules: Mapping[str, Any], exports: Collection[str], alike: Mapping[str, str],
             ) -> Description:
    """The description of this run: its settings with the values derived from them, and its ``modules`` (None: the run
    has no such module)."""
    spec = student.backbone.spec.identity()
    teachers = teacher.backbone.spec.identity() if teacher else dict.fromkeys(student.backbone.spec.record())
    of_losses = methods.options(args)
    given = {name: value for name, value in vars(args).items() if value is not None or name not in of_losses}
    config = {**given, "losses": {name: dict(x.settings) for name, x in loss.losses.items()},
              **methods.code_of(args), **code_record("data", args.data),
              "warmup_epochs": cli.take(Optimization, args).warmup,
              **({"branch": report.branch, "mean": report.mean, "std": report.std} if report else {}),
              **{name: spec[name] for name in spec if name != "arch"}, "student_arch": spec["arch"],
              "student_sha256": begun.sha256 if begun else None,
              **{f"teacher_{name}": value for name, value in teachers.items()},
              "teacher": report.record() if report else None,
              "teacher_sha256": report.sha256 if report else None, "data_fingerprint": source.fingerprint(),
              **{f"{name}_fingerprint": value for name, value in sampler.table_fingerprints.items()},
              "far_k": sampler.far_k, "num_clusters": sampler.num_clusters,
              "whole_clusters": bool(sampling.chosen_sampler(args).uneven_steps), "processes": process.world_size}
    kept = {**modules, "loss": loss if loss.state_dict() else None}
    return Description(config, {**student.record(), "teacher": config["teacher"]},
                       {name: module for name, module in kept.items() if module is not None}, exports,
                       args.resumable | FREE | of_losses.keys(), alike,
                       f"--loss {args.loss} is taken over the batch of each" if loss.per_process else "",
                       [afterwards.trunk_name(name) for name in exports])


def say_plan(run: Run, args: argparse.Namespace, source: ImageSource, sampler: RandomSampler, report: Report | None,
             student: Distiller, updater: Updater, notes: list[str]) -> None:
    """Write the first lines of the log: data, networks, number of steps, and the flags that have no effect."""
    process = run.process
    for line in (cli.ignored_flags_note(args), f"data: {source.description}", f"teacher: {report or 'none'}", *notes,
                 of_the_paper(student.backbone.spec.arch), *cli.unused(args, methods.SURROUNDINGS),
                 *methods.unused(args, student.proj_head),
                 f"student: {student.backbone.spec.arch}, {args.epochs} epochs of {len(sampler)} steps of "
                 f"{sampler.global_images_per_step} images on {process.world_size} x {process.device.type}, "
                 f"--amp {updater.amp}"):
        if line:
            run.log.say(line)


def pass_of(views: Sequence[Tensor], loss: Objective, student: Distiller, needs: CombinedNeeds,
            teacher: FrozenEncoder | None, momentum: MomentumStudent | None) -> Any:
    """All forward passes of a step, which change nothing but buffers; returns what the backward pass starts from."""
    inputs = loss.inputs(views)
    with torch.no_grad():
        targets = [teacher.targets(x, needs.teacher) for x in inputs.teacher]
        targets += [momentum.network(x) for x in inputs.momentum]
    return targets, student(*inputs.student)


def step_of(loss: Objective, forward: Callable[..., tuple[Tensor, ...]], student: Distiller, needs: CombinedNeeds,
            teacher: FrozenEncoder | None, momentum: MomentumStudent | None, micro_batch: int,
            ) -> Callable[[Batch], dict[str, Tensor]]:
    """A training step: a function from a batch to the named parts of its loss. ``forward``: the student's."""
    teacher_targets = in_parts(lambda images: teacher.targets(images, needs.teacher), micro_batch)
    logged_head = next((i for i, (_, to) in enumerate(needs.heads) if to), 0)  # the one compared with the teacher's

    @torch.no_grad()
    def targets_of(inputs: Inputs) -> dict[str, tuple[Tensor, ...]]:
        """The targets that the student's outputs are compared with, without gradient, [b, d] each."""
        found = {"teacher": tuple(y for x in inputs.teacher for y in teacher_targets(x))}
        if momentum:
            momentum.update(student)
            found["momentum"] = tuple(y for x in inputs.momentum for y in momentum(x))
        return found

    def step(batch: Batch) -> dict[str, Tensor]:
        inputs = loss.inputs(batch.views)                  # uint8 [b, 3, S, S] each, on the device
        targets = targets_of(inputs)
        outputs = forward(*inputs.student)                 # [b, d] each
        parts = loss(student=outputs, **targets, **inputs.context)
        return {**parts, "student": outputs[logged_head].detach(), **{name: x[0] for name, x in targets.items() if x}}

    return step


def after_epoch(run: Run, epoch: int, args: argparse.Namespace, sampler: RandomSampler, student: Distiller,
                knn: KnnMonitor | None) -> None:
    """Log which images the epoch has shown and, if it is due, the student's k-NN accuracy."""
    due = knn and knn.is_due(epoch + 1, args.knn_every, args.epochs)
    top1 = run.scored(lambda: knn.score(student.encoder())) if due else None
    run.log.scalars(run.steps, epoch, sampler.statistics.scalars(), "sampler")
    run.log.say(f"epoch {epoch + 1}: {sampler.statistics}")
    if due:
        run.note(epoch, "knn", {"top1": top1}, knn.description)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    limit_pixels(args.max_pixels)
    with start_process(args.device) as process:
        cli.same_flags(args, process)
        distil(args, process)


if __name__ == "__main__":
    run_script(main, less_memory=LESS_MEMORY)
