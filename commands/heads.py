"""A linear head on cached features, its learning rate and weight decay chosen on a share of the training images."""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

import cli
from evals.heads import Heads, sgd_heads, split_validation
from runtime.device import Process, gather_objects

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
DECAYS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)


def add_grid_flags(group: cli.Group, when: str = "") -> None:
    """The grid. ``when`` begins the help of each flag."""
    group.add_argument("--rates", type=cli.number(float, above=0), nargs="+", default=list(RATES), metavar="LR",
                       help=f"{when}learning rates of the grid, on features of unit variance; default "
                            + " ".join(f"{x:g}" for x in RATES))
    group.add_argument("--decays", type=cli.number(float, 0), nargs="+", default=list(DECAYS), metavar="WD",
                       help=f"{when}weight decays of the grid; default " + " ".join(f"{x:g}" for x in DECAYS))
    group.add_argument("--validation", type=cli.number(float, above=0, most=0.5), default=0.1, metavar="X",
                       help=f"{when}share of each class's training images on which the grid's best is chosen; it is "
                            "then trained on all of them; default 0.1")


def choose_head(features: Tensor, labels: np.ndarray, classes: int, args: argparse.Namespace, process: Process,
                ) -> tuple[Heads, dict[str, float]]:
    """The best head of the grid, trained on all features [n, d] with labels int64 [n], and what it was chosen by.

    Heads are independent, so each rank trains its own part of the grid (a collective); the last one all of them train.
    """
    truth = torch.from_numpy(labels)
    grid = [(rate, decay) for rate in args.rates for decay in args.decays]
    options = {"epochs": args.epochs, "batch_size": args.batch_size or 256, "seed": args.seed, "device": process.device,
               "progress": process.is_main}
    fit, held = (torch.from_numpy(rows) for rows in split_validation(labels, args.validation, args.seed))
    mine = grid[process.rank::process.world_size]
    scores = []
    if mine:
        heads = sgd_heads(features[fit], truth[fit], classes, mine, **options)
        scores = heads.accuracy(features[held], truth[held])[:, 0].tolist()
    found = {setting: score for part in gather_objects(dict(zip(mine, scores, strict=True)))
             for setting, score in part.items()}
    best = max(grid, key=found.__getitem__)
    head = sgd_heads(features, truth, classes, [best], **options)
    return head, {"lr": best[0], "wd": best[1], "validation_top1": found[best]}
