"""A linear classifier on the frozen network."""

from __future__ import annotations

import argparse
from typing import Any

import torch

import cli
from commands import common
from commands.heads import add_grid_flags, choose_head
from data.augment import linear_transform
from data.splits import open_labelled
from runtime.device import Process
from runtime.errors import UserError

HELP = "a linear classifier on the frozen network, by the paper's protocol or on cached features"


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
    add_grid_flags(group, "with --cached: ")


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
    head, chosen = choose_head(features[0], train.labels, len(train.classes), args, process)
    top1, top5 = head.accuracy(features[1], torch.from_numpy(test.labels))[0].tolist()
    metrics = {"top1": top1, "top5": top5, **chosen}
    return common.finish("linear", args, process, [network], {"train": train, "test": test}, metrics)
