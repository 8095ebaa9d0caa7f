"""One epoch of any training here, and the opening and closing of a run. The scripts say what a step is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime.device import Process, seed_everything
from runtime.errors import RunStopped, UserError
from runtime.log import Averages, FiniteAlarm, Meter, RunLog, duration
from runtime.optim import Updater
from runtime.state import CHECKPOINT, find_resume, load_checkpoint, random_state, save_checkpoint, set_random_state

Parts = dict[str, Tensor]

WAIT_SHARE = 0.2  # of an epoch, from which on there is advice


@dataclass
class Run:
    """A run's folder, log and place in time: ``epoch`` to do next, ``steps`` done since it began."""

    output: Path
    process: Process
    log: RunLog
    record: Mapping[str, Any]
    epoch: int
    steps: int
    resumed: dict[str, Any] | None

    @classmethod
    def open(cls, output: str, resume: str, config: dict[str, Any], record: Mapping[str, Any], volatile: set[str],
             process: Process, modules: Mapping[str, nn.Module | Updater], start_epoch: int | None = None) -> Run:
        """Start in ``output``, or go on from its last epoch: restores ``modules``, the log and the random state.

        ``config`` says which run this is (see :func:`runtime.state.find_resume`); ``record`` goes into every
        checkpoint. Raises :class:`UserError` before anything is written if the folder holds a different run.
        """
        folder = Path(output)
        path = find_resume(folder, resume, config, volatile)
        state = load_checkpoint(path) if path else None
        if state:
            restore(modules, state, path)
        epoch, steps = (state["epoch"], state["steps"]) if state else (0, 0)
        if start_epoch is not None and not (state and resume == "auto"):  # a restart goes on, whatever it began with
            epoch = start_epoch
        log = RunLog(folder, config, process.is_main, steps)
        run = cls(folder, process, log, record, epoch, steps, state)
        if path:
            log.say(f"going on from {path} at epoch {run.epoch}")
        return run

    def restore_random_state(self, seed: int) -> None:
        """Each rank's own random state: that of the checkpoint, or a fresh one from (seed, rank)."""
        rank, world = self.process.rank, self.process.world_size
        if not (self.resumed and set_random_state(self.resumed["random"], rank, world)):
            seed_everything(seed + rank)

    def save(self, epoch: int, modules: Mapping[str, nn.Module | Updater],
             exports: Mapping[str, Mapping[str, Tensor]]) -> None:
        """After ``epoch``: checkpoint.pth to go on from, and each of ``exports`` {file name: tensors} to use."""
        random = random_state()  # a collective: every rank gives its own
        broken = [f"{name}: {key}" for name, tensors in exports.items() for key, value in tensors.items()
                  if value.is_floating_point() and not torch.isfinite(value).all()]
        if broken:
            raise RunStopped(f"the weights are not finite after epoch {epoch} ({broken[0]}); nothing was saved over "
                             "the last checkpoint: lower --lr, or use --amp bf16 or off", every_process=False)
        if self.process.is_main:
            done = {**self.record, "epoch": epoch + 1, "steps": self.steps}
            states = {name: module.state_dict() for name, module in modules.items()}
            save_checkpoint({**done, **states, "random": random}, self.output / CHECKPOINT)
            for name, tensors in exports.items():
                save_checkpoint({**done, "state_dict": dict(tensors)}, self.output / name)

    def note(self, epoch: int, group: str, values: dict[str, float], description: str) -> None:
        """Scalars beside those of training, and a line in the log."""
        self.log.scalars(self.steps, epoch, values, group)
        self.log.say(f"epoch {epoch + 1}: {description}: " + "  ".join(f"{k} {v:.2f}" for k, v in values.items()))

    def finish(self, *lines: str) -> None:
        """Last words, and the log closed."""
        for line in (*filter(None, lines), f"done: {self.output}"):
            self.log.say(line)
        self.log.close()


def restore(modules: Mapping[str, nn.Module | Updater], state: Mapping[str, Any], path: Path) -> None:
    """Load each module's part of a checkpoint, strictly."""
    for name, module in modules.items():
        try:
            module.load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--resume {path} does not fit this run's {name} ({reason}); give the checkpoint of a run "
                            "with the same networks, or another --output") from None


@dataclass
class Trainer:
    """Runs epochs: batches in, one update each, and what is worth knowing to the log every ``print_freq`` steps.

    ``rate(epoch, step, steps)`` gives the learning rate. ``check`` looks at each batch before it is used.
    ``monitor`` turns the parts of a step into further scalars; it is called only when they are written.
    """

    run: Run
    updater: Updater
    loader: Any
    images_per_step: int
    epochs: int
    rate: Callable[[int, int, int], float]
    print_freq: int
    check: Callable[[Any], None]
    monitor: Callable[[Parts], Parts] | None = None

    def __post_init__(self) -> None:
        self.averages, self.alarm = Averages(), FiniteAlarm(self.run.output, self.run.process.rank)
        self.first_epoch, self.began = self.run.epoch, time.monotonic()

    def epoch(self, epoch: int, step_of: Callable[[Any], Parts]) -> None:
        """One pass over the loader. ``step_of(batch)`` is the forward pass; its dict has ``loss`` and other parts."""
        steps = len(self.loader)
        meter = Meter(self.loader, steps, self.images_per_step, f"epoch {epoch}", self.run.process.is_main)
        for step, batch in enumerate(meter):
            self.check(batch)
            rate = self.rate(epoch, step, steps)
            with self.updater.autocast():
                parts = step_of(batch)
            self.alarm.watch(parts, batch.indices, epoch, step)
            self.updater.step(parts["loss"], rate)
            self.run.steps += 1
            self.averages.add(parts)
            if (step + 1) % self.print_freq == 0 or step + 1 == steps:
                self._report(epoch, step + 1, steps, parts, rate, meter)
        self.alarm.check()
        self._say_of_data(epoch, meter.wait_share())

    def _say_of_data(self, epoch: int, waited: float) -> None:
        """Once an epoch, what the loader saved, and its advice if the step waits for it."""
        repeats, advice = (getattr(self.loader, name, str)() for name in ("repeats", "advice"))
        if repeats:
            self.run.log.say(f"epoch {epoch + 1}: {repeats}")
        if advice and waited > WAIT_SHARE:
            self.run.log.say(f"epoch {epoch + 1}: {waited:.0%} of the time went into waiting for data; {advice}")

    @torch.no_grad()
    def _report(self, epoch: int, done: int, steps: int, parts: Parts, rate: float, meter: Meter) -> None:
        if self.monitor:
            self.averages.add(self.monitor(parts))
        values = {**self.averages.take(), "lr": rate, **meter.rates()}
        past = (epoch - self.first_epoch) * steps + done
        left = (self.epochs - self.first_epoch) * steps - past
        self.run.log.scalars(self.run.steps, epoch, values)
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.run.log.say(f"epoch {epoch + 1}/{self.epochs} step {done}/{steps}  {text}  "
                         f"eta {duration((time.monotonic() - self.began) / past * left)}")
        meter.show({"loss": values["loss"]})
