"""What the root scripts share of their command lines: the parser, checked types, and groups of flags."""

from __future__ import annotations

import argparse
import os
from typing import NoReturn

from data.loader import CACHES, DATA_PATHS
from models.backbones import STEMS
from runtime.device import Process, same_on_every_rank
from runtime.nonfinite import POLICIES
from runtime.numbers import from_environment, number
from runtime.run import Interval

Group = argparse._ArgumentGroup


class Parser(argparse.ArgumentParser):
    """argparse without guesses at abbreviated flags, and with one sentence for a wrong command line."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        first = os.environ.get("LOCAL_RANK", "0") == "0"  # one sentence a machine, not one a process
        self.exit(2, f"error: {message}; {self.prog} --help lists every flag\n" if first else "")


def interval(text: str) -> str:
    """A type for argparse: text that runtime.run.Interval can read."""
    try:
        Interval.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def boolean(text: str) -> bool:
    """``true/1/yes`` or ``false/0/no``; the original's ``--cos False`` was true."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return words[text.lower()]


SHARE_OF = "each class's images; default 1, the paper's 1%% and 10%% rows use 0.01 and 0.1"


def add_data_flags(parser: argparse.ArgumentParser, *names: str, what: str, required: bool = True,
                   opens_images: bool = True, share_of: str = SHARE_OF) -> Group:
    """--data and how its images are read. ``names`` are other spellings of --data, ``share_of`` ends --subset's help.
    """
    group = parser.add_argument_group("data")
    group.add_argument("--data", *names, dest="data", metavar="DIR", required=required, help=what)
    group.add_argument("--subset", type=number(float), default=1.0, metavar="X",
                       help=f"take the first X (0-1] of {share_of}")
    if opens_images:
        add_image_flags(group)
    return group


DATA_HELP = ("images: an ImageFolder tree, a folder of images with or without sub-folders, a packed file (of "
             "pack_dataset.py), a .txt file of paths, or a name (demo, digits, cifar10, cifar100, stl10; kept in "
             "$COSS_DATASETS, else ./datasets). Of a folder that holds train/ and val/ or test/ (or packed files so "
             "called), train/ is taken; paths in a .txt are relative to it. No label is used")


def add_image_flags(group: Group) -> None:
    """How images are read and by how many workers."""
    group.add_argument("--image-size", "--image_size", type=number(int, 8, 8192), default=None, metavar="S",
                       help="side of the square that the networks see, in pixels; default: what the checkpoint "
                            "records, else 224 as in the paper")
    group.add_argument("-j", "--workers", "--num_workers", type=number(int, 0), default=default_workers(), metavar="N",
                       help="processes a rank that open and augment images; default: the machine's cores shared among "
                            "its ranks, at most 8")
    group.add_argument("--on-bad-image", choices=("error", "skip"), default="error",
                       help="a file that is no image stops the run (error, default), or is counted and replaced by "
                            "another, or left out of what is scored (skip)")


def add_view_flags(group: Group) -> None:
    """How training's augmented views are made."""
    group.add_argument("--data-path", choices=DATA_PATHS, default="fast",
                       help="how views are made: fast (default), decoded, cropped and resized by torch and coloured in "
                            "batches on the device, or pil, every step with Pillow as in the original; both draw the "
                            "same crops and colours, and pixels differ by less than 1.5 of 255 on average")
    group.add_argument("--cache", choices=CACHES, default="none",
                       help="host or device: decode all images once, keep them there, and make views in batches on the "
                            "device without workers; for small images of one size (CIFAR); default none")
    group.add_argument("--image-cache", type=number(float, 0), default=0.0, metavar="GB",
                       help="keep decoded images in shared memory of this size (10^9 bytes) a process, for all its "
                            "workers, first come first kept; the log gives the hit rate; default 0, none")


def add_device_flags(parser: argparse.ArgumentParser) -> Group:
    """--device, --seed, and the launcher's flags of old that torchrun made idle."""
    group = parser.add_argument_group("device and seed")
    group.add_argument("--device", default="auto", help="auto (default: a card if there is one), cpu, cuda or cuda:N")
    group.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0, metavar="N",
                       help="decides weights, order and augmentation; default 0 (the paper gives none)")
    group.add_argument("--distributed", action="store_true", help="accepted and ignored: torchrun says it")
    group.add_argument("--local_rank", "--local-rank", type=number(int), default=None, metavar="N",
                       help="accepted and ignored: torchrun says it")
    return group


def add_run_flags(parser: argparse.ArgumentParser, what: str) -> Group:
    """The run's folder and what is written there how often."""
    group = parser.add_argument_group("the run")
    group.add_argument("--output", metavar="DIR", required=True, help=what)
    group.add_argument("--resume", nargs="?", const="force", default="auto", metavar="PATH",
                       help="default: go on if --output holds this very run, else start; --resume alone goes on there "
                            "with changed settings; --resume PATH goes on from that checkpoint. A run goes on at the "
                            "step where it stopped, on a CPU to the bit as if it had not")
    group.add_argument("--save-every", type=interval, default="30m", metavar="N",
                       help="write checkpoint.pth within an epoch too, every N steps (500) or seconds, minutes or "
                            "hours (90s, 30m, 2h), 0 for never; default 30m. It is written after each epoch, and on "
                            "SIGTERM, SIGUSR1 and Ctrl-C, which end the run after its step with exit code 75 (a second "
                            "Ctrl-C ends it at once)")
    group.add_argument("--keep", type=number(int, 1), default=2, metavar="K",
                       help="checkpoints that are kept, checkpoint.pth and those before it; if the newest cannot be "
                            "read, the one before it is taken; default 2")
    group.add_argument("--on-nonfinite", choices=POLICIES, default="stop",
                       help="a loss that is not finite ends the run with exit code 3 (stop, default), or the step is "
                            "left out, gradients that are not finite too (skip; the host then waits for the device in "
                            "each step). Either way nonfinite.json and nonfinite.pth hold what the step began with")
    group.add_argument("--nonfinite-limit", type=number(int, 0), default=10, metavar="N",
                       help="steps in a row that --on-nonfinite skip may leave out before it ends the run; default 10")
    group.add_argument("-p", "--print-freq", type=number(int, 1), default=500, metavar="N",
                       help="steps between two lines of the log and of metrics.jsonl; default 500, the original's")
    return group


def run_options(args: argparse.Namespace) -> dict[str, object]:
    """The flags of :func:`add_run_flags` and --start-epoch, as keywords of runtime.run.Run.open."""
    return {"output": args.output, "resume": args.resume, "start_epoch": args.start_epoch,
            "save_every": args.save_every, "keep": args.keep, "on_nonfinite": args.on_nonfinite,
            "nonfinite_limit": args.nonfinite_limit}


def add_knn_flags(group: Group) -> None:
    """The k-NN score during training."""
    group.add_argument("--knn-every", type=number(int, 0), default=0, metavar="N",
                       help="every N epochs (and after the last) score the encoder by 10-NN on a held-out slice; "
                            "default 0, never")
    group.add_argument("--knn-data", default=None, metavar="ROOT",
                       help="labelled images for it, a folder with train/ and val/ or test/, or a name; "
                            "default: --data or the folder above it, whichever holds them")


def add_network_flags(group: Group, prefix: str = "--") -> None:
    """How a checkpoint is read, beside its path and architecture; ``prefix`` is ``--teacher-`` beside --distill."""
    stem_flag(group, f"{prefix}stem", whose="the network", default="what the checkpoint records or its first "
                                                                    "convolution shows")
    group.add_argument(f"{prefix}branch", dest="branch", default=None, metavar="NAME",
                       help="which network of a file with several (encoder_k, momentum_encoder, student.backbone, ...; "
                            "inspect_checkpoint.py lists them); default: the one that the method's own evaluation uses")
    group.add_argument(f"{prefix}mean", dest="mean", type=number(float), nargs=3, default=None, metavar="X",
                       help="mean of red, green and blue that the network was trained with, of images in [0, 1]; "
                            "default: its layout's, which the report shows (ImageNet's for most)")
    group.add_argument(f"{prefix}std", dest="std", type=number(float, above=0), nargs=3, default=None, metavar="X",
                       help="the same for the standard deviation")
    group.add_argument("--checkpoint-key", "--checkpoint_key", default=None, metavar="KEY",
                       help="entry of the file that holds the weights; default: found (state_dict, model, or bare)")
    group.add_argument("--trust-checkpoint", action="store_true",
                       help="unpickle whatever the file holds, which runs the code that it names; without it files are "
                            "read without running anything, and those that need it are refused")


def checkpoint_options(args: argparse.Namespace) -> dict[str, object]:
    """The flags of :func:`add_network_flags` but the stem, as keywords of models.teachers.load_frozen."""
    return {"key": args.checkpoint_key, "branch": args.branch, "mean": args.mean, "std": args.std,
            "trust": args.trust_checkpoint}


def stem_flag(group: Group, *names: str, whose: str, default: str) -> None:
    """--stem, which every checkpoint of ours records."""
    group.add_argument(*names, choices=STEMS, default=None,
                       help=f"stem of {whose}: imagenet (stride 2 and max-pool, as torchvision builds it), cifar (3x3, "
                            "stride 1, no max-pool, for images of about 32 pixels) or cifar_pad2 (the same padded by "
                            f"2, solo-learn's); default: {default}")


# What each machine of a job may have its own of: where things lie (what they are is compared where they are opened)
OWN = {"data", "knn_data", "weights", "distill", "closek_info", "fark_info", "cluster_info", "workers", "local_rank"}


def same_flags(args: argparse.Namespace, process: Process) -> None:
    """Refuse, on every rank, a job whose processes were given different flags."""
    same_on_every_rank({f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in OWN},
                       process)


def ignored_flags_note(args: argparse.Namespace) -> str | None:
    """A word for those who still pass the old launcher's flags."""
    if args.distributed or args.local_rank is not None:
        return "--distributed and --local_rank are not needed and are ignored: torchrun's environment decides"
    return None


def default_workers() -> int:
    """This process's share of the cores of the machine, at least 1 and at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // from_environment("LOCAL_WORLD_SIZE", 1, 1)))
