"""What the training scripts share of their command lines: optimizer, schedule, precision; and what these build."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from torch import nn

from cli import Group, boolean, number
from runtime.device import Process
from runtime.errors import UserError
from runtime.hardware import TF32, check_compiler, use_hardware
from runtime.optim import learning_rate
from runtime.optimizers import DECAYED, OPTIMIZERS, build_optimizer


def add_schedule_flags(group: Group, *, lr: float, epochs: int, source: str, warmup: int | None = None) -> None:
    """Optimizer and schedule; ``source`` says where the defaults come from, ``warmup=None`` is the original's."""
    usual = f"{warmup}" if warmup is not None else (
        "as the original, whose warm-up of 5 epochs never climbs: it holds the base rate, then drops on to the cosine")
    group.add_argument("--epochs", type=number(int, 1), default=epochs, metavar="N",
                       help=f"passes over the images (over the anchors, with neighbours); default {epochs}, {source}")
    group.add_argument("--start-epoch", type=number(int, 0), default=None, metavar="N",
                       help="count epochs from here in a fresh start or after an explicit --resume; default: where the "
                            "checkpoint stopped, else 0")
    group.add_argument("--lr", "--learning-rate", type=number(float, above=0), default=lr, metavar="LR",
                       help=f"base learning rate, not scaled by anything; default {lr:g}, {source}")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd",
                       help=f"sgd (default, {source}); lars, its rate adapted layer by layer (You et al., as in SwAV "
                            "and solo-learn, trust coefficient 0.001; biases and norms by plain sgd), for batches of "
                            "thousands and rates above 0.1; adamw, for transformers, with rates of about 0.001 or less")
    group.add_argument("--momentum", type=number(float, 0, 1), default=0.9,
                       help=f"momentum of sgd and lars, first beta of adamw; default 0.9, {source}")
    group.add_argument("--wd", "--weight-decay", dest="weight_decay", type=number(float, 0), default=1e-4, metavar="W",
                       help=f"weight decay; default 1e-4, {source}")
    group.add_argument("--decayed", choices=DECAYED, default="auto",
                       help="what decays: all, or kernels, the tensors of two and more dimensions, so not biases and "
                            f"the scales of norms; default auto: all for sgd, {source}, and kernels for lars and adamw")
    group.add_argument("--clip-grad", type=number(float, 0), default=0.0, metavar="X",
                       help="scale the gradient down where the norm of all of it is above X; default 0, never, "
                            f"{source}")
    group.add_argument("--warmup-epochs", type=number(int, 0), default=warmup, metavar="N",
                       help="climb linearly from 0 to the base rate over the steps of N epochs, 0 for none; default: "
                            + usual)
    group.add_argument("--cos", type=boolean, nargs="?", const=True, default=True, metavar="BOOL",
                       help="cosine schedule over the epochs, one rate an epoch; default true, as in the paper; "
                            "--cos false takes --schedule")
    group.add_argument("--schedule", type=number(int, 0), nargs="*", default=[120, 160], metavar="EPOCH",
                       help="with --cos false: epochs at which the rate falls to a tenth; default 120 160, the "
                            "original's")


def add_speed_flags(parser: argparse.ArgumentParser) -> Group:
    """Precision, and how a card is used."""
    group = parser.add_argument_group("precision and speed")
    group.add_argument("--amp", choices=("auto", "off", "fp16", "bf16"), default="auto",
                       help="mixed precision: auto (default) is fp16 with a gradient scaler on a card, as in the "
                            "original, and off on a CPU")
    group.add_argument("--tf32", choices=TF32, default="conv",
                       help="what of float32 runs on a card's TF32 units, 10 bits behind the point: conv, convolutions "
                            "(default, and PyTorch's own); all, matrix products too, those of the loss included, "
                            "which low temperatures do not survive; off, nothing. Matters where --amp is off")
    group.add_argument("--compile", action="store_true",
                       help="compile the networks by torch.compile: minutes at the start, a faster step afterwards; "
                            "default off")
    group.add_argument("--sync-bn", action="store_true",
                       help="take the trained network's batch-norm statistics over the batches of all cards, so that "
                            "their number does not change them; default off, as in the original")
    return group


def check_epochs(args: argparse.Namespace) -> None:
    """--start-epoch must leave something to do."""
    if args.start_epoch is not None and args.start_epoch >= args.epochs:
        raise UserError(f"--start-epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}; "
                        "epochs count from 0")


def schedule(args: argparse.Namespace) -> Callable[[int, int, int], float]:
    """The learning rate at (epoch, step, steps an epoch) that the flags of :func:`add_schedule_flags` describe."""
    return functools.partial(learning_rate, base=args.lr, epochs=args.epochs, warmup=args.warmup_epochs,
                             cosine=args.cos, milestones=args.schedule)


def optimizer(args: argparse.Namespace, network: nn.Module) -> torch.optim.Optimizer:
    """What the flags of :func:`add_schedule_flags` say, over those parameters of ``network`` that train."""
    return build_optimizer(args.optimizer, network.parameters(), args.lr, args.momentum, args.weight_decay,
                           args.decayed)


def prepare_hardware(args: argparse.Namespace, process: Process) -> None:
    """--tf32, and whether --compile and --sync-bn can be had, before anything is read."""
    use_hardware(args.tf32)
    if args.sync_bn and process.world_size > 1 and process.device.type == "cpu":
        raise UserError("--sync-bn needs cards, PyTorch has it for no CPU; leave it out, or start one process")
    if args.compile:
        check_compiler(process.device)


def synchronised(args: argparse.Namespace, network: nn.Module, process: Process) -> nn.Module:
    """``network`` with --sync-bn's layers where there are several processes, else as it is."""
    if args.sync_bn and process.world_size > 1:
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network
