"""The whole network trained on few labels."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import classifier_training, cli, evaluation
from data.augment import linear_transform
from data.loader import BadImageLog, evaluation_loader
from data.sources import ImageSource
from data.splits import open_labelled
from evals.classifier import Classifier, classification_parts
from evals.metrics import accuracy
from evals.sets.label_subset import balanced_subset, listed_subset
from models.teachers import Encoder
from runtime.agreement import together
from runtime.device import Process, broadcast, wrap
from runtime.optim import Updater
from search.features import extract, left_out

HELP = "the whole network trained on 1 %% or 10 %% of the labels, or on a list of images"
SWAV = "SwAV's semi-supervised evaluation"
FEW = 0.05  # a share of labels below this takes the rates for 1 %


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    data = evaluation.add_common_flags(parser)
    group = classifier_training.add_training_flags(parser, data, epochs=20, milestones="60 % and 80 % of them",
                                                   factor=0.2, source=SWAV)
    group.add_argument("--labels", required=True, metavar="X",
                       help="share of the training images in (0, 1], equally many of each class, drawn by --seed "
                            "(0.01, 0.1); or a file with one image a line, such as SimCLR's 1percent.txt: file names, "
                            "or paths below train/")
    group.add_argument("--lr", "--learning-rate", type=cli.number(float, above=0), default=None, metavar="LR",
                       help=f"learning rate of the backbone; default 0.01, {SWAV}, and 0.02 below 5 %% of the labels")
    group.add_argument("--head-lr", type=cli.number(float, above=0), default=None, metavar="LR",
                       help=f"learning rate of the classifier; default 0.2, {SWAV}, and 5 below 5 %% of the labels")


def in_all(args: argparse.Namespace) -> evaluation.Steps:
    """What `evaluate.py all` with ``args`` runs of it."""
    return [(f"finetune {share}", evaluation.on_data(args, "--labels", share)) for share in args.labels] or [
        ("finetune", evaluation.lacks(args, "data", "labels"))]


def run(args: argparse.Namespace, process: Process) -> dict[str, Any]:
    """Fine-tune the network with a classifier on few labels and report top-1 and top-5: random crops and flips, SGD
    with one learning rate for the backbone and one for the classifier, batch norm in training mode (over all GPUs), 20
    epochs, rates divided by 5 at epochs 12 and 16."""
    with together(process):
        evaluation.open_output(args)
        train, test = open_labelled(args.data)
        everything = train.subset(args.subset)
        share = as_share(args.labels)
        train = (listed_subset(everything, args.labels) if share is None else
                 balanced_subset(everything, share, args.seed))
        training = classifier_training.training_images(args, train, process)
        network = evaluation.open_network(args, process)
    few = len(train) < FEW * len(everything)
    metrics, rows = classifier_training.report(finetune(args, process, network, training, test, few))
    return evaluation.finish("finetune", args, process, [network], {"train": train, "test": test}, metrics, rows)


def as_share(text: str) -> float | None:
    """--labels as a number; None where it names a file."""
    try:
        return float(text)
    except ValueError:
        return None


def finetune(args: argparse.Namespace, process: Process, network: evaluation.Network,
             training: classifier_training.Images, test: ImageSource, few: bool) -> classifier_training.History:
    """Train backbone and head, and score after each epoch. ``few``: use the default rates for 1 % of the labels."""
    rate, head_rate = args.lr or (0.02 if few else 0.01), args.head_lr or (5.0 if few else 0.2)
    backbone = Encoder(network.encoder.backbone, network.encoder.mean, network.encoder.std)
    model = Classifier(backbone, len(training.train.classes)).to(process.device)
    if process.world_size > 1 and process.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # as SwAV; on CPUs each rank keeps its own
    optimizer = torch.optim.SGD([{"params": list(model.backbone.parameters())},
                                 {"params": list(model.head.parameters()), "lr_scale": head_rate / rate}],
                                rate, args.momentum, weight_decay=args.weight_decay)
    updater = Updater(optimizer, process.device, args.amp)
    parallel = wrap(model, process)
    labels = torch.from_numpy(test.labels)
    transform, check = linear_transform(network.spec.image_size), BadImageLog(test, args.on_bad_image).check

    def forward(images: Tensor, truth: Tensor) -> dict[str, Tensor]:
        parallel.train()
        return classification_parts(parallel(images), truth)

    def test_batches(indices: range) -> Any:
        return evaluation_loader(test, network.spec.image_size, args.feature_batch, args.workers, indices,
                                 process.device.type, transform=transform)

    def score() -> dict[str, float]:
        for buffer in model.buffers():  # running statistics may differ between ranks; rank 0's are saved
            broadcast(buffer)
        logits = extract(model, test_batches, len(test), process, "test", check, leave_out=args.on_bad_image == "skip")
        bad = left_out(logits)
        scored = np.delete(np.arange(len(test)), bad)
        top1, top5 = accuracy(logits[scored], labels[scored])
        return {"top1": top1, "top5": top5} | ({"left_out": len(bad)} if len(bad) else {})

    task = classifier_training.Task(model, updater, {"lr": rate, "head_lr": head_rate}, forward, score)
    return classifier_training.fit(args, process, "finetune", network, training, test, task)
