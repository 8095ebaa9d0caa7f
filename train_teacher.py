#!/usr/bin/env python
"""Pre-train a teacher on your own unlabelled images: MoCo v2, from scratch or from a file's weights.

    python train_teacher.py --data DIR --arch resnet18 --stem cifar --image-size 32 --output teacher/
    torchrun --nproc_per_node 8 train_teacher.py --data DIR --arch resnet50 --output teacher/
    python train_teacher.py --data DIR --weights FILE --freeze-trunk --epochs 5 --output teacher/  # a head for FILE

Defaults are those of MoCo v2 (arXiv 2003.04297) at 200 epochs. Writes to --output: teacher.pth in MoCo's own layout
(module.encoder_q.*), which every command here reads like a downloaded file, and checkpoint.pth, config.json,
metrics.jsonl, log.txt and TensorBoard events.
"""

from __future__ import annotations

if __name__ == "__main__":
    from runtime.start import begin
    begin(__file__)

import argparse
from typing import Any

import torch
from torch import Tensor

from checkpoints.by_name import look_at_weights
from checkpoints.frozen import load_frozen
from checkpoints.report import Report
from common import afterwards, cli
from common.first_step import MeasuredStep, check_step, long_queue
from common.training_data import TrainingData, open_images, open_monitor
from data.augment import PRESETS, augmentation
from data.loader import Batch
from data.samplers import RandomSampler
from data.sources import ImageSource
from evals.monitor import KnnMonitor
from losses.moco import MoCo
from models.backbones import ARCH_HELP, build_backbone, check_arch, check_batch
from models.moco_pretraining import MoCoEncoders
from models.place import place
from runtime.agreement import together
from runtime.device import Process, seed_everything, wrap
from runtime.errors import UserError, run_script
from runtime.hardware import Hardware
from runtime.job import RunSettings
from runtime.loop import Trainer
from runtime.optim import Updater
from runtime.optimizers import Optimization
from runtime.own import code_record
from runtime.run import Description, Run
from runtime.settings import add_settings


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description=__doc__)
    group = cli.add_data_flags(parser)
    cli.add_view_flags(group)
    group.add_argument("--aug", choices=sorted(PRESETS), default="moco_v2",
                       help="augmentation of each of the two views; default moco_v2")
    group.add_argument("-b", "--batch-size", type=cli.number(int, 2), default=256, metavar="N",
                       help="images per step over all processes; default 256, MoCo's")

    group = parser.add_argument_group("MoCo")
    group.add_argument("-a", "--arch", default=None, metavar="ARCH",
                       help=f"{ARCH_HELP}; default resnet50, MoCo's, or what the file of --weights holds")
    cli.check_by(group, "--arch", check_arch)
    cli.stem_flag(group, "--stem", whose="the network", unset="imagenet, or that of the --weights file")
    add_settings(group, MoCoEncoders)
    add_settings(group, MoCo, flags={"queue_size": "--moco-k --queue-size", "s_temp": "--moco-t"}, help={
        "queue_size": "keys in the queue; default {default}, MoCo's", "s_temp": "temperature; default {default}, MoCo "
                                                                                "v2's"})
    group.add_argument("--weights", default=None, metavar="PATH",
                       help="start from the trunk of this checkpoint, in any layout of docs/CHECKPOINTS.md, "
                            "with a new head; default: a random network")
    cli.check_by(group, "--weights", look_at_weights)
    cli.add_network_flags(group, stem=False)
    cli.only(group, "--feature --branch --mean --std --checkpoint-key --trust-checkpoint --freeze-trunk",
             "with --weights", lambda args: bool(args.weights))
    cli.add_optimization_flags(parser, "MoCo v2's", "MoCo v2's 0.03 for 256", epochs=200, warmup_epochs=0)
    cli.add_speed_flags(parser)
    group = cli.add_run_flags(parser)
    cli.add_knn_flags(group)
    cli.add_device_flags(parser)
    return parser.parse_args(argv)


def check_flags(args: cli.Arguments) -> None:
    """What can be said of the command line alone, before anything is read."""
    cli.take(Optimization, args).check()
    if args.queue_size < args.batch_size:
        raise UserError(f"--moco-k {args.queue_size} is less than --batch-size {args.batch_size}, so one step "
                        "would overrun the queue; give a longer queue")
    if args.freeze_trunk and not args.weights:
        raise UserError("--freeze-trunk leaves nothing to learn from a random trunk; give its checkpoint by "
                        "--weights")
    cli.check_files(args)


def pretrain(args: argparse.Namespace, process: Process) -> None:
    """Data, model, optimizer, resume, loop."""
    with together(process):
        check_flags(args)
        hardware, optimization = cli.take(Hardware, args), cli.take(Optimization, args)
        hardware.prepare(process)
        seed_everything(args.seed)
        source, image_size = open_images(args), args.image_size or 224
        sampler = RandomSampler(len(source), args.batch_size, process.rank, process.world_size, args.seed)
        data = TrainingData.open(args, source, sampler, [augmentation(args.aug, image_size)] * 2, image_size, process)
        moco, report = build_moco(args, image_size)
        moco = place(moco, process.device)
        loss = MoCo(args.moco_dim, **cli.values(MoCo, args)).to(process.device)
        check_batch(moco, sampler.images_per_step)
        optimization, rate = optimization.scaled(MoCo.recipe.lr, MoCo.recipe.images, sampler.global_images_per_step)
        moco.encoder_q = hardware.synchronised(moco.encoder_q, process)  # the key's images are shuffled instead
        updater = Updater(optimization.build(moco), process.device, args.amp, args.clip_grad)
        step = MeasuredStep(lambda images: pass_of(moco, *images), [moco], data.views, sampler.images_per_step)
        notes = check_step(step, updater, args.workers, process,
                           data.small.advice() + "lower --batch-size or --image-size")
        notes += [rate, data.small.note(), long_queue(loss, len(data.source), "--moco-k")]
        knn = open_monitor(args, image_size, process)

    modules = {"state_dict": moco, "loss": loss, "updater": updater}
    what = describe(args, process, data.source, moco, report, modules, knn, optimization)
    run = Run.open(cli.take(RunSettings, args), what, process, args.seed, args.start_epoch)
    if report:
        run.log.say(f"weights: {report}", shown=f"weights: {report.short()}")
    run.log.say(cli.ignored_flags_note(args), *cli.unused(args), f"data: {data.source.description}", *notes,
                f"MoCo v2: {moco.spec.arch}{', only its head' * args.freeze_trunk}, {args.epochs} epochs of "
                f"{len(sampler)} steps of {args.batch_size} images, queue {args.queue_size}, on "
                f"{process.world_size} x {process.device.type}, --amp {updater.amp}")
    for encoder in (moco.encoder_q, moco.encoder_k) if args.compile else ():
        encoder.compile()
    model = wrap(moco, process)

    def losses_of(batch: Batch) -> dict[str, Tensor]:
        q, k = model(*batch.views)  # two views, uint8 [b, 3, S, S], on the device
        return loss(student=q, momentum=k)

    trainer = Trainer(run, updater, data.loader, sampler.global_images_per_step, args.epochs, optimization.rate,
                      args.print_freq, data.bad_images.check)
    for epoch in range(run.epoch, args.epochs):
        sampler.set_epoch(epoch, run.step)
        model.train()
        trainer.epoch(epoch, losses_of)
        if knn and knn.is_due(epoch + 1, args.knn_every, args.epochs):
            run.note(epoch, "knn", {"top1": run.scored(lambda: knn.score(moco.trunk()))}, knn.description)
        run.save(epoch, {"teacher.pth": moco.encoder_state()})
    run.finish(data.bad_images.summary(),
               uses=afterwards.use_teacher(run.output / "teacher.pth", args.data, moco.spec.arch))


def describe(args: argparse.Namespace, process: Process, source: ImageSource, moco: MoCoEncoders,
             report: Report | None, modules: dict[str, Any], knn: KnnMonitor | None,
             optimization: Optimization) -> Description:
    """The description of this run: its settings with the values derived from them, and its ``modules``."""
    spec = moco.spec
    config = {**vars(args), "lr": optimization.lr, "arch": spec.arch, "stem": spec.stem, "image_size": spec.image_size,
              "feature": spec.feature,
              **code_record("data", args.data), **({"code_sha256": spec.code_sha256} if spec.code_sha256 else {}),
              "weights_sha256": report.sha256 if report else None, "data_fingerprint": source.fingerprint(),
              "processes": process.world_size}
    return Description(config, moco.record(), modules, ["teacher.pth"], args.resumable | {"processes", "weights"},
                       knn.fingerprints() if knn else {}, flags=args.flags)


def pass_of(moco: MoCoEncoders, query_images: Tensor, key_images: Tensor) -> tuple[Tensor, Tensor]:
    """Both forward passes of a step, which change nothing but buffers."""
    q = moco.encoder_q(moco.normalise(query_images))
    with torch.no_grad():
        return q, moco.encoder_k(moco.normalise(key_images))


def build_moco(args: argparse.Namespace, image_size: int) -> tuple[MoCoEncoders, Report | None]:
    """The network to train, and the report on --weights."""
    options = cli.values(MoCoEncoders, args)
    if not args.weights:
        backbone = build_backbone(args.arch or "resnet50", args.stem or "imagenet", image_size)
        return MoCoEncoders(backbone, **options), None
    start, report = load_frozen(args.weights, args.arch, args.stem, image_size, **cli.checkpoint_options(args))
    backbone = start.backbone.requires_grad_(True).train()
    return MoCoEncoders(backbone, **options, mean=start.mean, std=start.std), report


def main() -> None:
    """Parse, join the job, train."""
    args = parse_args()
    with cli.joined(args) as process:
        pretrain(args, process)


if __name__ == "__main__":
    run_script(main)
