"""A linear classifier on the frozen network."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import cli
from commands import common, training
from data.augment import linear_transform
from data.sources import ImageSource
from data.splits import open_labelled
from evals.classifier import classification_parts, fingerprint, linear_head
from evals.heads import Heads, sgd_heads, split_validation
from evals.lbfgs import lbfgs_heads
from evals.metrics import accuracy
from runtime.device import Process, agree, gather_objects, wrap
from runtime.optim import Updater, precision

HELP = "a linear classifier on the frozen network, by the paper's protocol or on cached features"
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
DECAYS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)
DECAYS_LBFGS = tuple(10 ** (half / 2) for half in range(-12, 1))
Setting = tuple[float, ...]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    data = common.add_common_flags(parser)
    group = training.add_training_flags(parser, data, epochs=100, milestones="60 %% and 80 %% of them", factor=0.1,
                                        source="the original's")
    group.add_argument("--lr", "--learning-rate", type=cli.number(float, above=0), default=None, metavar="LR",
                       help="base learning rate; default 30, the original's, and 3 for EfficientNets, as such papers' "
                            "rows have it")
    group = parser.add_argument_group("on cached features")
    group.add_argument("--cached", action="store_true",
                       help="extract centre-crop features once and train a grid of classifiers on them side by side: "
                            "minutes instead of days, without augmentation; of the training flags only --epochs and "
                            "--batch-size then count, for --solver sgd")
    group.add_argument("--solver", choices=("lbfgs", "sgd"), default="lbfgs",
                       help="lbfgs (default): the minimum for each weight decay of the grid; sgd: momentum 0.9 and a "
                            "cosine, for each pair of learning rate and weight decay")
    group.add_argument("--decays", type=cli.number(float, 0), nargs="+", default=None, metavar="WD",
                       help="weight decays of the grid, on features of unit variance; default: 13 from 1e-6 to 1 for "
                            "lbfgs, " + " ".join(f"{x:g}" for x in DECAYS) + " for sgd")
    group.add_argument("--rates", type=cli.number(float, above=0), nargs="+", default=list(RATES), metavar="LR",
                       help="learning rates of the grid of sgd; default " + " ".join(f"{x:g}" for x in RATES))
    group.add_argument("--iterations", type=cli.number(int, 1), default=200, metavar="N",
                       help="iterations of lbfgs at most; default 200")
    group.add_argument("--validation", type=cli.number(float, above=0, most=0.5), default=0.1, metavar="X",
                       help="share of each class's training images on which the grid's best is chosen; it is then "
                            "trained on all of them; default 0.1. The test images choose nothing")


def run(args: argparse.Namespace, process: Process) -> dict[str, Any]:
    """Top-1 and top-5 of a linear classifier on the frozen network's pooled features, by the original's protocol:
    random crops and flips, SGD with learning rate 30, batch 256, 100 epochs, a tenth at 60 and 80; or --cached."""
    common.open_output(args)
    train, test = open_labelled(args.data)
    train = train.subset(args.subset)
    network = common.open_network(args, process)
    sources = {"train": train, "test": test}
    if args.cached:
        metrics = grid_on_features(args, process, network, train, test)
        return common.finish("linear", args, process, [network], sources, metrics)
    metrics, rows = training.report(protocol(args, process, network, train, test))
    return common.finish("linear", args, process, [network], sources, metrics, rows)


def protocol(args: argparse.Namespace, process: Process, network: common.Network, train: ImageSource,
             test: ImageSource) -> training.History:
    """The original's protocol. The test images' features are made once: the network is frozen and their crop fixed."""
    encoder, before = network.encoder, fingerprint(network.encoder)
    features = common.features(network, test, args, process, "test features",
                               linear_transform(network.spec.image_size))
    labels = torch.from_numpy(test.labels)
    head = linear_head(network.spec.feature_dim, len(train.classes)).to(process.device)
    rate = args.lr or (3.0 if "efficientnet" in network.spec.arch else 30.0)
    optimizer = torch.optim.SGD(head.parameters(), rate, args.momentum, weight_decay=args.weight_decay)
    updater = Updater(optimizer, process.device, precision(args.amp, process.device))
    model = wrap(head, process)

    def forward(images: Tensor, truth: Tensor) -> dict[str, Tensor]:
        found = encoder(images).float()                                                           # [b, d]
        with torch.autocast(process.device.type, enabled=False):
            return classification_parts(model(found), truth)

    @torch.no_grad()
    def score() -> tuple[float, float]:
        logits = torch.cat([head(part.to(process.device, torch.float32)).cpu() for part in features.split(4096)])
        top1, top5 = accuracy(logits, labels)
        return top1, top5

    milestones = args.schedule if args.schedule is not None else [round(0.6 * args.epochs), round(0.8 * args.epochs)]
    history = training.fit(args, process, "linear", network, train, test, head, updater, rate, milestones, forward,
                           score, head.state_dict, {"lr": rate})
    changed = fingerprint(encoder) != before
    agree("the frozen network changed while the classifier was trained; the score is void, please report this"
          if changed else None)
    return history


def grid_on_features(args: argparse.Namespace, process: Process, network: common.Network, train: ImageSource,
                     test: ImageSource) -> dict[str, float]:
    """The grid on centre-crop features: the best on a part of the training images is trained on all of them."""
    transform = linear_transform(network.spec.image_size)
    features = [common.features(network, source, args, process, f"{role} features", transform)
                for role, source in (("train", train), ("test", test))]
    labels = [torch.from_numpy(source.labels) for source in (train, test)]
    grid = grid_of(args)

    def solve(rows: Tensor | slice, settings: list[Setting]) -> Heads:
        common_options = {"device": process.device, "progress": process.is_main}
        data = features[0][rows], labels[0][rows], len(train.classes)
        if args.solver == "lbfgs":
            return lbfgs_heads(*data, [decay for decay, in settings], iterations=args.iterations, **common_options)
        size = training.batch_size(args, len(data[1]), process)
        return sgd_heads(*data, settings, epochs=args.epochs, batch_size=size, seed=args.seed, **common_options)

    fit, held = (torch.from_numpy(rows) for rows in split_validation(train.labels, args.validation, args.seed))
    mine, scores = grid[process.rank::process.world_size], []  # heads are independent: each rank trains its own
    if mine:
        scores = solve(fit, mine).accuracy(features[0][held], labels[0][held])[:, 0].tolist()
    found = {setting: score for part in gather_objects(dict(zip(mine, scores, strict=True)))
             for setting, score in part.items()}
    best = max(grid, key=found.__getitem__)
    top1, top5 = solve(slice(None), [best]).accuracy(features[1], labels[1])[0].tolist()
    chosen = {"wd": best[-1]} if args.solver == "lbfgs" else {"lr": best[0], "wd": best[1]}
    return {"top1": top1, "top5": top5, **chosen, "validation_top1": found[best]}


def grid_of(args: argparse.Namespace) -> list[Setting]:
    """The settings that --cached tries: (decay,) for lbfgs, (rate, decay) for sgd."""
    if args.solver == "lbfgs":
        return [(decay,) for decay in args.decays or DECAYS_LBFGS]
    return [(rate, decay) for rate in args.rates for decay in args.decays or DECAYS]
