"""Training a classifier on labelled images, epoch by epoch with resume: what linear and finetune share."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common import cli, evaluation
from data.augment import LINEAR, Augmentation
from data.cache import pooled
from data.loader import BadImageLog, Batch, build_loader
from data.samplers import RandomSampler
from data.sources import ImageSource
from evals.classifier import labels_of
from runtime.device import Process
from runtime.hardware import Hardware
from runtime.job import RunSettings
from runtime.loop import Trainer
from runtime.optim import Updater
from runtime.optimizers import Optimization
from runtime.run import Description, Run
from runtime.settings import add_settings, declared

NOT_OF_A_CLASSIFIER = ("start_epoch", "lr", "optimizer", "decayed", "clip_grad", "warmup_epochs", "cos")


def add_training_flags(parser: argparse.ArgumentParser, data: cli.Group, *, epochs: int, milestones: str, factor: float,
                       source: str) -> cli.Group:
    """Batches, schedule and precision; ``source`` says where the defaults come from. Returns the group."""
    cli.add_view_flags(data)
    group = parser.add_argument_group("training")
    add_settings(group, Optimization, source=source, without=NOT_OF_A_CLASSIFIER, epochs=epochs, weight_decay=0.0,
                 schedule=None, help={"epochs": "passes over the training images; default {default}, {source}",
                       "schedule": f"epochs at which the rate is multiplied by --factor; default: at {milestones}, "
                                   "{source}"})
    group.add_argument("-b", "--batch-size", type=cli.number(int, 1), default=None, metavar="N",
                       help=f"images of a step over all processes; default 256, {source}, or all where there are fewer")
    group.add_argument("--factor", type=cli.number(float, above=0, most=1), default=factor, metavar="X",
                       help=f"see --schedule; default {factor:g}, {source}")
    declared(Hardware)["amp"].add_to(group, "off", "mixed precision of the network, the classifier stays float32: off "
                                     "(default, as the original), fp16 with a gradient scaler, bf16, or auto: fp16 on "
                                     "a GPU and off on a CPU")
    declared(RunSettings)["print_freq"].add_to(group)
    return group


@dataclass
class History:
    """The test scores after each epoch, in order: ``epoch`` (from 1), ``top1`` and ``top5`` in percent, and, if there
    are any, ``left_out``, the unreadable test images."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def best(self) -> dict[str, float]:
        """The first epoch with the highest top-1."""
        return max(self.rows, key=lambda row: row["top1"])

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.rows = list(state["rows"])


def batch_size(args: argparse.Namespace, images: int, process: Process) -> int:
    """--batch-size, or 256, or all images if there are fewer, rounded down to a multiple of the processes."""
    if args.batch_size:
        return args.batch_size
    return max(min(256, images) // process.world_size, 1) * process.world_size


class Images(NamedTuple):
    """The training images, their order, and the image cache if --image-cache is set."""

    train: ImageSource
    sampler: RandomSampler
    pooled: ImageSource


def training_images(args: argparse.Namespace, train: ImageSource, process: Process) -> Images:
    """What :func:`fit` trains on. Refuses a batch size or cache that does not fit before anything is computed."""
    sampler = RandomSampler(len(train), batch_size(args, len(train), process), process.rank, process.world_size,
                            args.seed)
    return Images(train, sampler, pooled(train, args.image_cache, args.cache))


@dataclass(frozen=True)
class Task:
    """What :func:`fit` trains: ``trained``, by ``updater``, at the rates of ``rates``, of which ``lr`` is the base.

    ``forward(images, labels)`` returns this rank's loss and its parts, ``score()`` (a collective) the test images'
    ``top1``, ``top5`` and whatever else to record.
    """

    trained: nn.Module
    updater: Updater
    rates: Mapping[str, float]
    forward: Callable[[Tensor, Tensor], dict[str, Tensor]]
    score: Callable[[], dict[str, float]]


def fit(args: argparse.Namespace, process: Process, command: str, network: evaluation.Network, training: Images,
        test: ImageSource, task: Task) -> History:
    """Train in OUTPUT/COMMAND-ID/ and score after each epoch; the same command resumes there.

    ID is a hash of everything that affects the result, so runs with different settings use different folders. best.pth
    and last.pth hold the trained tensors.
    """
    spec, (train, sampler, source) = network.spec, training
    loader = build_loader(source, [Augmentation(LINEAR, spec.image_size)], sampler, args.workers, args.seed,
                          process.device, args.data_path, args.cache)
    bad_images, label_of = BadImageLog(train, args.on_bad_image), labels_of(torch.tensor(train.labels))
    milestones = args.schedule if args.schedule is not None else [round(0.6 * args.epochs), round(0.8 * args.epochs)]
    history = History()
    modules = {"state_dict": task.trained, "updater": task.updater, "history": history}
    config = {"command": command, **evaluation.settings(args), **task.rates, **network.record(),
              "batch_size": sampler.batch_size, "schedule": milestones, "train": train.identity(times=False),
              "test": test.identity(times=False)}
    identity = {key: value for key, value in config.items() if key != "weights"}
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    record = {**spec.record(), "mean": list(network.encoder.mean), "std": list(network.encoder.std)}
    settings = RunSettings(str(evaluation.open_output(args) / f"{command}-{name}"), save_every="0")
    run = Run.open(settings, Description(config, record, modules, ["best.pth", "last.pth"], {"weights"}), process,
                   args.seed)

    def step(batch: Batch) -> dict[str, Tensor]:
        images, = batch.views                                              # uint8 [b, 3, S, S], on the device
        return task.forward(images, label_of(batch.indices, batch.bad).to(process.device))

    def rate_at(epoch: int, step: int, steps: int) -> float:  # noqa: ARG001 - the trainer's signature
        return task.rates["lr"] * args.factor ** sum(epoch >= milestone for milestone in milestones)

    trainer = Trainer(run, task.updater, loader, sampler.global_images_per_step, args.epochs, rate_at, args.print_freq,
                      bad_images.check)
    for epoch in range(run.epoch, args.epochs):
        sampler.set_epoch(epoch, run.step)
        trainer.epoch(epoch, step)
        scores = run.scored(task.score)
        history.rows.append({"epoch": epoch + 1, **scores})
        run.note(epoch, "test", scores, f"{len(test):,} test images")
        tensors = task.trained.state_dict()
        run.save(epoch, {"last.pth": tensors} | (
            {"best.pth": tensors} if history.best()["epoch"] == epoch + 1 else {}))
    run.finish(bad_images.summary())
    return history


def report(history: History) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metrics and the table: the best epoch by the test images, as papers report it, and the last."""
    rows = {"best": history.best(), "last": history.rows[-1]}
    return rows, [{"of": name, **row} for name, row in rows.items()]
