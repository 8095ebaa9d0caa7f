#!/usr/bin/env python
"""Faster R-CNN with a feature pyramid, fine-tuned from any ResNet checkpoint with torchvision alone, and scored.

    python scripts/detection_torchvision.py --data COCO --weights run/student.pth --output detection/
    torchrun --nproc_per_node 8 scripts/detection_torchvision.py --data VOCdevkit --weights run/student.pth \\
        --output detection/ --epochs 23 --sizes 480 512 544 576 608 640 672 704 736 768 800

COCO holds annotations/instances_train2017.json, annotations/instances_val2017.json, train2017/ and val2017/. The score
is COCO's average precision, by the package pycocotools. For numbers comparable with papers use detectron2, with the
configurations in scripts/detection/. Started again, a run resumes from its last step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from runtime.start import begin
    begin()

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from checkpoints.frozen import load_frozen, untrained
from common import (
    cli,
    networks,
)
from data.samplers import RandomSampler
from evals.average_precision import NAMES, average_precision, detect, need_pycocotools
from evals.results import add_result, save_table, table
from evals.sets.box_batches import BoxBatch, check_boxes, evaluation_batches, training_batches
from evals.sets.boxes import BoxSource, open_pair, read_coco, same_classes
from models.faster_rcnn import NORMS, faster_rcnn, parameter_groups
from runtime.agreement import on_first_rank
from runtime.device import Process, broadcast, seed_everything, wrap
from runtime.errors import UserError, run_script
from runtime.job import RunSettings
from runtime.loop import Trainer
from runtime.optim import Updater
from runtime.provenance import versions
from runtime.run import Description, Run

REFERENCE_BATCH, WARMUP = 16, 1000  # detectron2's images a step for a rate of 0.02, and its steps of warm-up
SIZES = [640, 672, 704, 736, 768, 800]
ELSEWHERE = {"weights", "train", "test", "eval_every"}  # what the files hold is checked; scores decide nothing


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description=__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="DIR", default=None,
                       help="a folder in COCO's layout (see above), or in VOC's: VOC2007/ and, if present, "
                            "VOC2012/ (or VOCdevkit/ that holds them), trained on trainval of both and tested on "
                            "VOC2007's test")
    for name in ("train", "test"):
        group.add_argument(f"--{name}", nargs=2, metavar=("JSON", "IMAGES"), default=None,
                           help=f"instead of --data: a file in COCO's format and its images' folder, to {name} on")
    group.add_argument("--sizes", type=cli.number(int, 32), nargs="+", default=SIZES, metavar="S",
                       help="pixels of an image's shorter side, drawn for each image in training; the last is the "
                            f"test's. Default {' '.join(map(str, SIZES))}, detectron2's for COCO")
    group.add_argument("--max-size", type=cli.number(int, 32), default=1333, metavar="S",
                       help="most pixels of the longer side; default 1333, detectron2's")
    cli.add_opening_flags(group)
    networks.add_weights_flags(parser)

    group = parser.add_argument_group("training")
    group.add_argument("--norm", choices=NORMS, default="batch",
                       help="batch (default): all layers are trained, batch norm too, over the images of all GPUs, "
                            "and the pyramid has it, as in MoCo's protocol; frozen: the network's batch norm is a "
                            "fixed scale, and its stem and first stage stay as they are")
    group.add_argument("--epochs", type=cli.number(int, 1), default=12, metavar="N",
                       help="passes over the training images; default 12, about the 1x schedule on COCO (90,000 steps "
                            "of 16 images)")
    group.add_argument("-b", "--batch-size", type=cli.number(int, 1), default=REFERENCE_BATCH, metavar="N",
                       help="images per step over all processes; default 16, detectron2's")
    group.add_argument("--lr", "--learning-rate", type=cli.number(float, above=0), default=None, metavar="LR",
                       help="learning rate; default 0.02 for 16 images, detectron2's, and in proportion for others. It "
                            "climbs to there over the first 1,000 steps, or the first epoch if that has fewer")
    group.add_argument("--schedule", type=cli.number(int, 0), nargs="*", default=None, metavar="EPOCH",
                       help="epochs at which the rate is divided by 10; default: 2/3 and 8/9 of --epochs, as in "
                            "the 1x schedule")
    group.add_argument("--momentum", type=cli.number(float, 0, 1), default=0.9,
                       help="SGD momentum; default 0.9, detectron2's")
    group.add_argument("--wd", "--weight-decay", dest="weight_decay", type=cli.number(float, 0), default=1e-4,
                       metavar="W", help="weight decay, of all but batch norm; default 1e-4, detectron2's")
    group.add_argument("--amp", choices=("auto", "off", "fp16", "bf16"), default="off",
                       help="mixed precision: off (default, as detectron2), fp16 with a gradient scaler, bf16, or "
                            "auto: fp16 on a GPU and off on a CPU")
    group.add_argument("--eval-every", type=cli.number(int, 0), default=0, metavar="N",
                       help="also score every N epochs; default 0, only after the last")
    cli.add_run_flags(parser, "folder of this run: detector.pth, detection.md, a line of results.jsonl, the log")
    cli.add_device_flags(parser)
    return parser.parse_args(argv)


@dataclass
class Scores:
    """The scores of each scored epoch: ``epoch`` (from 1), NAMES in percent, and ``classes``."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.rows = list(state["rows"])


def open_data(args: argparse.Namespace) -> tuple[BoxSource, BoxSource]:
    """Training and test images."""
    if bool(args.data) == bool(args.train or args.test) or bool(args.train) != bool(args.test):
        raise UserError("give --data DIR, or --train JSON IMAGES and --test JSON IMAGES, and not a part of either")
    if args.data:
        return open_pair(args.data)
    return same_classes(read_coco(*args.train, "--train"), read_coco(*args.test, "--test"), "--test")


def open_detector(args: argparse.Namespace, classes: int) -> tuple[FasterRCNN, dict[str, Any], object]:
    """The detector around the trunk of --weights, what identifies that, and the report of the match, if any."""
    report, identity = None, {"sha256": f"{networks.UNTRAINED}-{args.seed}"}
    if args.weights == networks.UNTRAINED:
        if not args.arch:
            raise UserError(f"--weights {networks.UNTRAINED} needs --arch; add, for example, --arch resnet18")
        encoder = untrained(args.arch, 224, args.stem or "imagenet")
    else:
        encoder, report = load_frozen(args.weights, args.arch, args.stem, **cli.checkpoint_options(args))
        identity = {"sha256": report.sha256, "branch": report.branch}
    trunk = encoder.backbone
    detector = faster_rcnn(trunk, encoder.mean, encoder.std, classes, args.norm, args.sizes, args.max_size)
    spec = trunk.spec.record()
    return detector, {**identity, "arch": spec["arch"], "stem": spec["stem"], "mean": list(encoder.mean),
                      "std": list(encoder.std)}, report


def rate_of(base: float, milestones: list[int]) -> Callable[[int, int, int], float]:
    """The learning rate at (epoch, step, steps an epoch): a climb, then a tenth at each milestone."""
    def rate(epoch: int, step: int, steps: int) -> float:
        done, climb = epoch * steps + step, min(WARMUP, steps)
        return base * min(1.0, 1e-3 + done / climb) * 0.1 ** sum(epoch >= milestone for milestone in milestones)
    return rate


def train(args: argparse.Namespace, process: Process) -> None:
    """Data, detector, optimizer, resume, loop, scores."""
    need_pycocotools()
    seed_everything(args.seed)
    train_set, test_set = open_data(args)
    rows = train_set.with_objects()
    sampler = RandomSampler(len(rows), args.batch_size, process.rank, process.world_size, args.seed)
    loader = training_batches(train_set, rows, sampler, args.workers, args.seed, process.device.type)
    model, identity, report = open_detector(args, len(train_set.classes))
    model = model.to(process.device)
    if process.world_size > 1 and process.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # on CPUs each rank keeps its own statistics
    lr = args.lr or 0.02 * args.batch_size / REFERENCE_BATCH
    milestones = (args.schedule if args.schedule is not None else
                  [round(2 / 3 * args.epochs), round(8 / 9 * args.epochs)])
    optimizer = torch.optim.SGD(parameter_groups(model), lr, args.momentum, weight_decay=args.weight_decay)
    updater, scores = Updater(optimizer, process.device, args.amp), Scores()
    sources = {role: {"title": source.title, "images": len(source), "objects": len(source.boxes),
                      "fingerprint": source.fingerprint()}
               for role, source in (("train", train_set), ("test", test_set))}
    config = {**vars(args), **identity, "lr": lr, "schedule": milestones, "classes": train_set.classes,
              "sources": sources, "processes": process.world_size}
    what = Description(config, {**identity, "classes": train_set.classes},
                       {"state_dict": model, "updater": updater, "scores": scores}, ["detector.pth"],
                       args.resumable | ELSEWHERE, flags=args.flags)
    run = Run.open(cli.take(RunSettings, args), what, process, args.seed)
    if report:
        run.log.say(str(report), shown=report.short())
    run.log.say(cli.ignored_flags_note(args),
                f"train: {train_set.title}, {len(rows):,} images with objects of {len(train_set):,}; test: "
                f"{test_set.title}, {len(test_set):,} images; {len(train_set.classes)} classes")
    parallel = wrap(model, process)

    def step(batch: BoxBatch) -> dict[str, Tensor]:
        images = [view.to(process.device, non_blocking=True).float() / 255 for view in batch.views]  # [3, H, W] each
        losses = parallel(images, [{name: value.to(process.device, non_blocking=True) for name, value in
                                    target.items()} for target in batch.targets])
        return {"loss": sum(losses.values()), **losses}

    trainer = Trainer(run, updater, loader, sampler.global_images_per_step, args.epochs, rate_of(lr, milestones),
                      args.print_freq, check_boxes)
    for epoch in range(run.epoch, args.epochs):
        sampler.set_epoch(epoch, run.step)
        parallel.train()
        trainer.epoch(epoch, step)
        last = epoch + 1 == args.epochs
        if last or (args.eval_every and (epoch + 1) % args.eval_every == 0):
            found = run.scored(lambda: score(args, process, model, test_set))
            scores.rows.append({"epoch": epoch + 1, **found})
            run.note(epoch, "test", {name: found[name] for name in NAMES[:3]}, f"{len(test_set):,} test images")
        run.save(epoch, {"detector.pth": model.state_dict()})
    run.finish()
    if process.is_main:
        leave_result(args, process, identity, sources, {"lr": lr, "schedule": milestones}, scores.rows)


def score(args: argparse.Namespace, process: Process, model: nn.Module, test_set: BoxSource) -> dict[str, Any]:
    """Average precision on the test images, each rank looking at its share (a collective)."""
    for buffer in model.buffers():  # running statistics may differ between ranks; rank 0's are saved
        broadcast(buffer)
    batches = evaluation_batches(test_set, networks.share_of(len(test_set), process),
                                 max(1, args.batch_size // process.world_size), args.workers, process.device.type)
    results = detect(model, batches, process, check_boxes)
    return on_first_rank(lambda: average_precision(test_set.coco(), results), process)


def leave_result(args: argparse.Namespace, process: Process, identity: dict[str, Any], sources: dict[str, Any],
                 decided: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """A line of results.jsonl, detection.md, and the table on the screen: overall, and each class."""
    *_, final = rows
    settings = {**decided, **{name: getattr(args, name) for name in (
        "norm", "epochs", "batch_size", "momentum", "weight_decay", "amp", "sizes", "max_size", "seed")}}
    lines = [{"class": "all", **{name: final[name] for name in NAMES}},
             *({"class": name, "AP": value} for name, value in final["classes"].items())]
    add_result(Path(args.output), {
        "command": "detection", "weights": args.weights, **identity, "data": args.data or [args.train, args.test],
        "sources": sources, "settings": settings, "metrics": {name: final[name] for name in NAMES}, "table": lines,
        "epochs": rows, "versions": versions(), "processes": process.world_size, "device": str(process.device)})
    save_table(Path(args.output) / "detection.md", lines)
    print(f"detection: {args.weights}, {identity['arch']}, Faster R-CNN with a feature pyramid; "
          f"{sources['test']['title']}, {sources['test']['images']:,} images")
    print(table(lines))


def main() -> None:
    args = parse_args()
    with cli.joined(args, own={"train", "test"}) as process:
        train(args, process)


if __name__ == "__main__":
    run_script(main)
