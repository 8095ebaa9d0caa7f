"""Settings of a job: its device, its seed, its folder, and how often it saves."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from runtime.boards import BOARDS, check_board
from runtime.nonfinite import POLICIES
from runtime.settings import Setting, Used


class Interval(NamedTuple):
    """An interval: every ``steps`` or every ``seconds``, whichever is not 0."""

    steps: int
    seconds: float

    @classmethod
    def parse(cls, text: str) -> Interval:
        """``500`` steps, or ``90s``, ``30m``, ``2h``; ``0`` is never. Raises ValueError."""
        match = re.fullmatch(r"(\d+)([smh]?)", text)
        if not match:
            raise ValueError(f"{text!r} is neither a number of steps (500) nor a time (90s, 30m, 2h)")
        if len(match[1]) > 9:
            raise ValueError(f"{match[1][:40]!r} is too long an interval; give at most 9 digits, or 0 for never")
        count, unit = int(match[1]), match[2]
        return cls(0, count * {"s": 1.0, "m": 60.0, "h": 3600.0}[unit]) if unit else cls(count, 0.0)

    def due(self, steps: int, seconds: float) -> bool:
        """Whether it is due, ``steps`` after the beginning and ``seconds`` after the last time."""
        return bool(self.steps and steps and steps % self.steps == 0 or self.seconds and seconds >= self.seconds)


def interval(text: str) -> str:
    """Text that :class:`Interval` can read; raises argparse.ArgumentTypeError."""
    try:
        Interval.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


@dataclass(frozen=True)
class RunSettings:
    """The folder of a run, and how often it logs and saves. None of these settings makes it a different run."""

    output: Annotated[str, Setting("folder of this run; an interrupted run resumes from its last step",
                                   metavar="DIR", resumable=True, basic=True)]
    resume: Annotated[str, Setting(
        "default: resume if --output holds this run, otherwise start; --resume alone resumes there with changed "
        "settings; --resume PATH resumes from that checkpoint. A run resumes at the step where it stopped, on a CPU "
        "bit-identical to an uninterrupted run", metavar="PATH", nargs="?", const="force",
        resumable=True, basic=True)] = "auto"
    save_every: Annotated[str, Setting(
        "also write checkpoint.pth within an epoch, every N steps (500) or seconds, minutes or hours (90s, 30m, 2h); 0 "
        "for never; default {default}. It is also written after each epoch, and on SIGTERM, SIGUSR1 and Ctrl-C, which "
        "end the run after its step with exit code 75 (a second Ctrl-C ends it at once)", metavar="N", parse=interval,
        resumable=True)] = "30m"
    keep: Annotated[int, Setting(
        "checkpoints to keep, checkpoint.pth and those before it; if the newest is unreadable, the one before it "
        "is used; default {default}", least=1, metavar="K", resumable=True)] = 2
    on_nonfinite: Annotated[str, Setting(
        "a loss that is not finite ends the run with exit code 3 (stop, default), or the step is skipped, also for "
        "gradients that are not finite (skip; the host then waits for the device in each step). Either way "
        "nonfinite.json and nonfinite.pth hold the state before that step", choices=POLICIES, resumable=True)] = "stop"
    nonfinite_limit: Annotated[int, Setting(
        "consecutive steps that --on-nonfinite skip may skip before it ends the run; default {default}", least=0,
        metavar="N", resumable=True), Used("with --on-nonfinite skip", lambda args: args.on_nonfinite == "skip")] = 10
    print_freq: Annotated[int, Setting(
        "steps between lines of the log and of metrics.jsonl; default {default}, the original's",
        "-p --print-freq", least=1, metavar="N", resumable=True)] = 500
    log_to: Annotated[str, Setting(
        "where curves go beside metrics.jsonl: tensorboard (default), or wandb, there and to Weights & Biases "
        "(WANDB_PROJECT, WANDB_MODE=offline in the environment)", choices=BOARDS, resumable=True,
        check=check_board)] = "tensorboard"


@dataclass(frozen=True)
class JobSettings:
    """The device and the seed, and the flags of the original's launcher, which torchrun has replaced."""

    device: Annotated[str, Setting(
        "auto (default: a CUDA GPU if there is one, else the CPU), cpu, cuda, cuda:N, or mps on a Mac "
        "(docs/RUNS.md); the processes of a job wait 10 minutes for one another at the start "
        "(COSS_JOIN_SECONDS in the environment changes it)", resumable=True, basic=True)] = "auto"
    seed: Annotated[int, Setting("decides weights, order and augmentation; default {default} (the paper gives none)",
                                 least=0, most=2**31 - 1, metavar="N", basic=True)] = 0
    distributed: Annotated[bool, Setting("accepted and ignored: torchrun sets it", resumable=True)] = False
    local_rank: Annotated[int | None, Setting("accepted and ignored: torchrun sets it", "--local_rank --local-rank",
                                              metavar="N", resumable=True)] = None

    def ignored(self) -> str | None:
        """Warn that the flags of the original's launcher do nothing."""
        if self.distributed or self.local_rank is not None:
            return "--distributed and --local_rank are not needed and are ignored: torchrun's environment decides"
        return None
