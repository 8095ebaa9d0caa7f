"""A linear classifier on the frozen network."""

from __future__ import annotations

import argparse
from typing import Any

import torch

import cli
from commands import common
from data.augment import linear_transform
from data.splits import open_labelled
from evals.heads import sgd_heads, split_validation
from runtime.device import Process, gather_objects
from runtime.errors import UserError

HELP = "a linear classifier on the frozen network, by the paper's protocol or on cached features"
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
DECAYS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    common.add_common_flags(parser)
    group = parser.add_argument_group("linear classifier")
    group.add_argument("--cached", action="store_true",
                       help="extract centre-crop features once and train a grid of heads on them")
    group.add_argument("--epochs", type=cli.number(int, 1), default=100, metavar="N",
                       help="passes over the training images; default 100, the original's")
    group.add_argument("-b", "--batch-size", type=cli.number(int, 1), default=256, metavar="N",
                       help="images of one step; default 256, the original's")
    group.add_argument("--rates", type=cli.number(float, above=0), nargs="+", default=list(RATES), metavar="LR",
                       help="with --cached: learning rates of the grid, on features of unit variance; default "
                            + " ".join(f"{x:g}" for x in RATES))
    group.add_argument("--decays", type=cli.number(float, 0), nargs="+", default=list(DECAYS), metavar="WD",
                       help="with --cached: weight decays of the grid; default " + " ".join(f"{x:g}" for x in DECAYS))
    group.add_argument("--validation", type=cli.number(float, above=0, most=0.5), default=0.1, metavar="X",
                       help="with --cached: share of each class's training images on which the grid's best is chosen; "
                            "it is then trained on all of them; default 0.1")


def run(args: argparse.Namespace, process: Process) -> dict[str, Any]:
    """Top-1 and top-5 of a linear classifier on the frozen network's pooled features."""
    if not args.cached:
        raise UserError("linear without --cached is not available yet; add --cached")
    common.open_output(args)
    train, test = open_labelled(args.data)
    train = train.subset(args.subset)
    network = common.open_network(args, process)
    transform = linear_transform(network.spec.image_size)
    features = [common.features(network, source, args, process, f"{role} features", transform)
                for role, source in (("train", train), ("test", test))]
    labels = [torch.from_numpy(source.labels) for source in (train, test)]
    grid = [(rate, decay) for rate in args.rates for decay in args.decays]
    options = {"epochs": args.epochs, "batch_size": args.batch_size, "seed": args.seed, "device": process.device,
               "progress": process.is_main}

    fit, held = (torch.from_numpy(rows) for rows in split_validation(train.labels, args.validation, args.seed))
    mine = grid[process.rank::process.world_size]  # heads are independent: each rank trains its own
    scores = []
    if mine:
        heads = sgd_heads(features[0][fit], labels[0][fit], len(train.classes), mine, **options)
        scores = heads.accuracy(features[0][held], labels[0][held])[:, 0].tolist()
    found = {setting: score for part in gather_objects(dict(zip(mine, scores, strict=True)))
             for setting, score in part.items()}
    best = max(grid, key=found.__getitem__)
    head = sgd_heads(features[0], labels[0], len(train.classes), [best], **options)
    top1, top5 = head.accuracy(features[1], labels[1])[0].tolist()
    metrics = {"top1": top1, "top5": top5, "lr": best[0], "wd": best[1], "validation_top1": found[best]}
    return common.finish("linear", args, process, [network], {"train": train, "test": test}, metrics)
