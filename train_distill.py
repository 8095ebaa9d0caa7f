#!/usr/bin/env python
"""Distil a frozen self-supervised teacher into a small student, without labels.

    python compute_knn.py mine --data DIR --arch resnet50 --weights moco.pth --output nn/ --k 384
    torchrun --nproc_per_node 4 train_distill.py --data DIR --distill moco.pth -k resnet50 -a resnet18 \\
        --sampler cf --closek-info nn/closek_info.npy --nearest-k 15 --total-k 31 -b 64 --output run/

Defaults are those of the paper's ResNet rows (CoSS, ECCV 2024), but for --head-init. Without torchrun it runs as one
process. The folder --output gets config.json, metrics.jsonl, log.txt, TensorBoard events, checkpoint.pth (to resume
from), student.pth and student_trunk.pth (to use).
"""

from __future__ import annotations

if __name__ == "__main__":
    from runtime.start import begin
    begin(__file__)

import argparse

from common import afterwards, cli, cli_original, distillation, methods, sampling
from common.first_step import check_step, long_queue
from common.parts import Parts, build_parts
from common.training_data import TrainingData, open_images, open_monitor
from data.samplers import RandomSampler
from evals.monitor import KnnMonitor
from losses import needs_of, recipe_of
from models.distiller import Distiller, agreement
from models.momentum import MovingAverage
from models.original import of_the_paper
from runtime.agreement import together
from runtime.device import Process, seed_everything, wrap
from runtime.errors import UserError, run_script
from runtime.hardware import Hardware
from runtime.job import RunSettings
from runtime.loop import Trainer
from runtime.micro_batches import parts_of
from runtime.optim import Updater
from runtime.optimizers import Optimization
from runtime.own import code_record
from runtime.run import Description, Run
from runtime.settings import add_settings

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
    group = cli.add_optimization_flags(parser, "the paper's", "the rate of --loss's paper (coss: 0.03 for 1,024)")
    add_settings(group, MovingAverage, ema=0.0)
    group = cli.add_speed_flags(parser)
    add_settings(group, parts_of)
    group = cli.add_run_flags(parser)
    cli.add_knn_flags(group)
    cli.add_device_flags(parser)
    methods.add_own_flags(parser, words)
    return parser.parse_args(words)


def distil(args: cli.Arguments, process: Process) -> None:
    """The experiment: data, networks and loss, optimizer, run, loop."""
    with together(process):
        check_flags(args)
        hardware, optimization = cli.take(Hardware, args), cli.take(Optimization, args)
        hardware.prepare(process)
        seed_everything(args.seed)
        source, needs = open_images(args), needs_of(args.loss)
        teacher, report = distillation.load_teacher(args, needs)
        teacher_size = teacher.backbone.spec.image_size if teacher else None
        image_size = args.image_size or teacher_size or 224
        sampler, source, notes = sampling.open_sampler(args, process, source, report)
        views = distillation.views_of(args.aug, image_size, teacher_size or image_size, needs)
        data = TrainingData.open(args, source, sampler, views, image_size, process)
        parts, said = build_parts(args, data, teacher, report, process)
        recipe = recipe_of(args.loss)
        optimization, rate = optimization.scaled(recipe.lr, recipe.images, sampler.global_images_per_step)
        parts.student = hardware.synchronised(parts.student, process)
        updater = Updater(optimization.build(parts.student), process.device, args.amp, args.clip_grad,
                          parts.after_update)
        fits = check_step(parts.measured_step(data), updater, args.workers, process, data.small.advice() + LESS_MEMORY)
        notes += [*said, rate, *fits,
                  data.small.note(f" (with --teacher-image-size {image_size} if the teacher needs it)"),
                  long_queue(parts.loss, len(data.source), "--queue-size")]
        knn = open_monitor(args, image_size, process)

    what = describe(args, data, parts, updater, optimization, knn, process)
    run = Run.open(cli.take(RunSettings, args), what, process, args.seed, args.start_epoch)
    say_plan(run, args, data, parts, updater, notes)
    parts.prepare(updater.dtype, args.compile)
    model = wrap(parts.student, process)
    forward = updater.in_micro_batches(model, args.micro_batch)
    trainer = Trainer(run, updater, data.loader, sampler.global_images_per_step, args.epochs, optimization.rate,
                      args.print_freq, data.bad_images.check,
                      monitor=lambda found: agreement(found["student"], found.get("teacher")),
                      watch=parts.watch)
    for epoch in range(run.epoch, args.epochs):
        sampler.set_epoch(epoch, run.step)
        parts.loss.set_epoch(epoch)
        model.train()
        trainer.epoch(epoch, lambda batch: parts.step(batch, forward))
        after_epoch(run, epoch, args, sampler, parts.student, knn)
        run.save(epoch, {name: network.student_state() for name, network in parts.exports.items()})
    finish(run, args, data, parts)


def check_flags(args: cli.Arguments) -> None:
    """Check what can be checked from the command line alone, before anything is read."""
    cli.take(Optimization, args).check()
    if args.device == "mps" and args.micro_batch:
        raise UserError("--micro-batch computes outputs twice with the same random numbers, which --device mps cannot "
                        "repeat; leave it out, or give --device cpu")
    methods.check_loss(args)
    sampling.check_sampler(args)
    cli.check_files(args)


def describe(args: cli.Arguments, data: TrainingData, parts: Parts, updater: Updater, optimization: Optimization,
             knn: KnnMonitor | None, process: Process) -> Description:
    """The description of this run: its settings with the values derived from them, its modules and its files."""
    report, sampler, spec = parts.report, data.sampler, parts.student.backbone.spec
    student = spec.identity()
    teacher = parts.teacher.backbone.spec.identity() if parts.teacher else dict.fromkeys(spec.record())
    of_losses = methods.options(args)
    given = {name: value for name, value in vars(args).items() if value is not None or name not in of_losses}
    config = {**given, "losses": {name: dict(x.settings) for name, x in parts.loss.losses.items()},
              **methods.code_of(args), **code_record("data", args.data),
              "lr": optimization.lr, "warmup_epochs": optimization.warmup,
              "head_init": distillation.chosen_start(args.head_init, parts.loss),
              **({"branch": report.branch, "mean": report.mean, "std": report.std} if report else {}),
              **{name: value for name, value in student.items() if name != "arch"}, "student_arch": student["arch"],
              "student_sha256": parts.begun.sha256 if parts.begun else None,
              **{f"teacher_{name}": value for name, value in teacher.items()},
              "teacher": report.record() if report else None,
              "teacher_sha256": report.sha256 if report else None, "data_fingerprint": data.source.fingerprint(),
              **{f"{name}_fingerprint": value for name, value in sampler.table_fingerprints.items()},
              "far_k": sampler.far_k, "num_clusters": sampler.num_clusters,
              "whole_clusters": bool(sampling.chosen_sampler(args).uneven_steps), "processes": process.world_size}
    return Description(config, {**parts.student.record(), "teacher": config["teacher"]},
                       {**parts.modules, "updater": updater}, parts.exports, args.resumable | FREE | of_losses.keys(),
                       knn.fingerprints() if knn else {},
                       f"--loss {args.loss} is taken over the batch of each" if parts.loss.per_process else "",
                       [afterwards.trunk_name(name) for name in parts.exports], args.flags)


def say_plan(run: Run, args: cli.Arguments, data: TrainingData, parts: Parts, updater: Updater, notes: list[str],
             ) -> None:
    """Write the first lines of the log: data, networks, number of steps, and the flags that have no effect."""
    process, arch = run.process, parts.student.backbone.spec.arch
    run.log.say(f"teacher: {parts.report or 'none'}", shown=parts.report and f"teacher: {parts.report.short()}")
    if parts.begun:
        run.log.say(f"the student starts from {parts.begun}", shown=f"the student starts from {parts.begun.short()}")
    run.log.say(cli.ignored_flags_note(args), f"data: {data.source.description}", *notes, of_the_paper(arch),
                *cli.unused(args, methods.SURROUNDINGS), *methods.unused(args, parts.student.proj_head),
                f"student: {arch}, {args.epochs} epochs of {len(data.sampler)} steps of "
                f"{data.sampler.global_images_per_step} images on {process.world_size} x {process.device.type}, "
                f"--amp {updater.amp}")


def after_epoch(run: Run, epoch: int, args: cli.Arguments, sampler: RandomSampler, student: Distiller,
                knn: KnnMonitor | None) -> None:
    """Log which images the epoch has shown and, if it is due, the student's k-NN accuracy."""
    due = knn and knn.is_due(epoch + 1, args.knn_every, args.epochs)
    top1 = run.scored(lambda: knn.score(student.encoder())) if due else None
    run.log.scalars(run.steps, epoch, sampler.statistics.scalars(), "sampler")
    run.log.say(f"epoch {epoch + 1}: {sampler.statistics}")
    if due:
        run.note(epoch, "knn", {"top1": top1}, knn.description)


def finish(run: Run, args: cli.Arguments, data: TrainingData, parts: Parts) -> None:
    """Leave each student's trunk alone beside it, and say how the student is used and evaluated."""
    arch = parts.student.backbone.spec.arch
    trunks = afterwards.write_trunks(run.output, parts.exports, arch, run.process)
    run.finish(data.bad_images.summary(), uses=[*trunks, *afterwards.use_student(
        run.output / "student.pth", args.data, args.distill if parts.teacher else None, arch)])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with cli.joined(args) as process:
        distil(args, process)


if __name__ == "__main__":
    run_script(main, less_memory=LESS_MEMORY)
