"""A linear classifier on the frozen network."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from common import classifier_training, cli, evaluation
from common.head_choice import add_grid_flags, choose_head, held_out
from data.augment import linear_transform
from data.sources import ImageSource
from data.splits import open_labelled
from evals.classifier import classification_parts, fingerprint, linear_head
from evals.metrics import accuracy
from runtime.agreement import together
from runtime.device import Process, wrap
from runtime.errors import UserError
from runtime.optim import Updater

HELP = "a linear classifier on the frozen network, by the paper's protocol or on cached features"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    data = evaluation.add_common_flags(parser)
    group = classifier_training.add_training_flags(parser, data, epochs=100, milestones="60 % and 80 % of them",
                                                   factor=0.1, source="the original's")
    group.add_argument("--lr", "--learning-rate", type=cli.number(float, above=0), default=None, metavar="LR",
                       help="base learning rate; default 30, the original's, and 3 for EfficientNets, as in papers "
                            "on them")
    group = parser.add_argument_group("on cached features")
    group.add_argument("--cached", action="store_true",
                       help="extract centre-crop features once and train a grid of classifiers on them side by side: "
                            "minutes instead of days, without augmentation; only the training flags --epochs and "
                            "--batch-size are used, by --solver sgd")
    add_grid_flags(group, "with --cached: ")
    cli.only(group, "--lr --schedule --factor --momentum --wd --amp --data-path", "without --cached",
             lambda args: not args.cached)
    cli.only(group, "--epochs --batch-size", "without --cached, or with --solver sgd",
             lambda args: not args.cached or args.solver == "sgd")


def in_all(args: argparse.Namespace) -> evaluation.Steps:
    """What `evaluate.py all` with ``args`` runs of it."""
    steps = [("linear", evaluation.on_data(args, "--cached"))]
    return steps + [("linear, protocol", evaluation.on_data(args))] * args.protocol


def run(args: argparse.Namespace, process: Process) -> dict[str, Any]:
    """Top-1 and top-5 of a linear classifier on the frozen network's pooled features, by the original's protocol:
    random crops and flips, SGD with learning rate 30, batch 256, 100 epochs, a tenth at 60 and 80; or --cached."""
    with together(process):
        evaluation.open_output(args)
        train, test = open_labelled(args.data)
        train = train.subset(args.subset)
        training = None if args.cached else classifier_training.training_images(args, train, process)
        if args.cached:
            held_out(args, train.labels)
        network = evaluation.open_network(args, process)
    transform, rows = linear_transform(network.spec.image_size), None
    features, test = evaluation.features(network, test, args, process, "test features", transform)
    if args.cached:
        of_train, train = evaluation.features(network, train, args, process, "train features", transform)
        metrics = grid_on_features(args, process, of_train, train, features, test)
    else:
        metrics, rows = classifier_training.report(protocol(args, process, network, training, features, test))
    return evaluation.finish("linear", args, process, [network], {"train": train, "test": test}, metrics, rows)


def protocol(args: argparse.Namespace, process: Process, network: evaluation.Network,
             training: classifier_training.Images, features: Tensor, test: ImageSource,
             ) -> classifier_training.History:
    """The original's protocol. The test images' ``features`` are computed once: network and crop are fixed."""
    encoder, before = network.encoder, fingerprint(network.encoder)
    labels = torch.from_numpy(test.labels)
    head = linear_head(network.spec.feature_dim, len(training.train.classes)).to(process.device)
    rate = args.lr or (3.0 if "efficientnet" in network.spec.arch else 30.0)
    optimizer = torch.optim.SGD(head.parameters(), rate, args.momentum, weight_decay=args.weight_decay)
    updater = Updater(optimizer, process.device, args.amp)
    model = wrap(head, process)

    def forward(images: Tensor, truth: Tensor) -> dict[str, Tensor]:
        found = encoder(images).float()                                                           # [b, d]
        with torch.autocast(process.device.type, enabled=False):
            return classification_parts(model(found), truth)

    @torch.no_grad()
    def score() -> dict[str, float]:
        logits = torch.cat([head(part.to(process.device, torch.float32)).cpu() for part in features.split(4096)])
        top1, top5 = accuracy(logits, labels)
        return {"top1": top1, "top5": top5}

    history = classifier_training.fit(args, process, "linear", network, training, test,
                                      classifier_training.Task(head, updater, {"lr": rate}, forward, score))
    with together(process):
        if fingerprint(encoder) != before:
            raise UserError("the frozen network changed while the classifier was trained; the score is void, please "
                            "report this")
    return history


def grid_on_features(args: argparse.Namespace, process: Process, of_train: Tensor, train: ImageSource, of_test: Tensor,
                     test: ImageSource) -> dict[str, float]:
    """The grid on centre-crop features: choose the best on held-out training images, then train it on all of them."""
    head, chosen = choose_head(of_train, train.labels, len(train.classes), args, process)
    top1, top5 = head.accuracy(of_test, torch.from_numpy(test.labels))[0].tolist()
    return {"top1": top1, "top5": top5, **chosen}
