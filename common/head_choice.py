"""A linear head on cached features; learning rate and weight decay are chosen on held-out training images."""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from common import cli
from evals.head_grid import Heads, sgd_heads, split_validation
from evals.lbfgs import lbfgs_heads
from runtime.device import Process, gather_objects
from runtime.errors import UserError

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
DECAYS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)
DECAYS_LBFGS = tuple(10 ** (half / 2) for half in range(-12, 1))
Setting = tuple[float, ...]  # (decay,) for lbfgs, (rate, decay) for sgd


def add_grid_flags(group: cli.Group, when: str = "") -> None:
    """The grid. ``when`` begins the help of each flag."""
    group.add_argument("--solver", choices=("lbfgs", "sgd"), default="lbfgs",
                       help=f"{when}lbfgs (default), converged for each weight decay of the grid, or sgd, momentum "
                            "0.9 and a cosine over --epochs for each pair of learning rate and weight decay")
    group.add_argument("--decays", type=cli.number(float, 0), nargs="+", default=None, metavar="WD",
                       help=f"{when}weight decays of the grid, on features of unit variance; default: 13 from 1e-6 to "
                            "1 for lbfgs, " + " ".join(f"{x:g}" for x in DECAYS) + " for sgd")
    group.add_argument("--rates", type=cli.number(float, above=0), nargs="+", default=list(RATES), metavar="LR",
                       help=f"{when}learning rates of the grid of sgd; default " + " ".join(f"{x:g}" for x in RATES))
    group.add_argument("--iterations", type=cli.number(int, 1), default=200, metavar="N",
                       help=f"{when}maximum iterations of lbfgs; default 200")
    group.add_argument("--validation", type=cli.number(float, above=0, most=0.5), default=0.1, metavar="X",
                       help=f"{when}share of each class's training images used to choose the best of the grid (among "
                            "equals the one with more decay), which is then trained on all of them; default 0.1. The "
                            "test images are not used for the choice")
    cached = " and --cached" if when else ""
    cli.only(group, "--rates", f"with --solver sgd{cached}",
             lambda args: args.solver == "sgd" and getattr(args, "cached", True))
    cli.only(group, "--iterations", f"with --solver lbfgs{cached}",
             lambda args: args.solver == "lbfgs" and getattr(args, "cached", True))
    if when:
        cli.only(group, "--solver --decays --validation", "with --cached", lambda args: args.cached)


def choose_head(features: Tensor, labels: np.ndarray, classes: int, args: argparse.Namespace, process: Process,
                ) -> tuple[Heads, dict[str, float]]:
    """The best head of the grid, trained on all features [n, d] with labels int64 [n], and the basis of the choice.

    Heads are independent, so each rank trains its own part of the grid (a collective); every rank trains the final one.
    Raises :class:`UserError` if no class has enough images to hold some out.
    """
    truth, grid = torch.from_numpy(labels), grid_of(args)
    fit, held = map(torch.from_numpy, held_out(args, labels))

    def solve(rows: Tensor | slice, settings: list[Setting]) -> Heads:
        data, where = (features[rows], truth[rows], classes), {"device": process.device, "progress": process.is_main}
        if args.solver == "lbfgs":
            return lbfgs_heads(*data, [decay for decay, in settings], iterations=args.iterations, **where)
        size = args.batch_size or 256
        return sgd_heads(*data, settings, epochs=args.epochs, batch_size=size, seed=args.seed, **where)

    mine, scores = grid[process.rank::process.world_size], []
    if mine:
        scores = solve(fit, mine).accuracy(features[held], truth[held])[:, 0].tolist()
    found = {setting: score for part in gather_objects(dict(zip(mine, scores, strict=True)))
             for setting, score in part.items()}
    best = max(grid, key=lambda setting: (found[setting], setting[-1]))
    chosen = {"wd": best[-1]} if args.solver == "lbfgs" else {"lr": best[0], "wd": best[1]}
    return solve(slice(None), [best]), {**chosen, "validation_top1": found[best]}


def held_out(args: argparse.Namespace, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64 [m] to train on, and the held-out rows. Raises :class:`UserError` if none can be held out."""
    fit, held = split_validation(labels, args.validation, args.seed)
    if not len(held):
        raise UserError(f"--validation {args.validation:g} holds out none of the {len(labels):,} training images, as "
                        "their classes are small; give more images, or a larger share (at most 0.5)")
    return fit, held


def grid_of(args: argparse.Namespace) -> list[Setting]:
    """Every setting that is tried."""
    if args.solver == "lbfgs":
        return [(decay,) for decay in args.decays or DECAYS_LBFGS]
    return [(rate, decay) for rate in args.rates for decay in args.decays or DECAYS]
