"""The training loop over one epoch, for all scripts; each script defines its own step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.agreement import all_reduce_max, share_error
from runtime.device import gather_objects
from runtime.errors import UserError
from runtime.log import Meter, duration
from runtime.nonfinite import FiniteAlarm
from runtime.optim import Updater
from runtime.run import Run

Parts = dict[str, Tensor]

WAIT_SHARE = 0.2  # share of an epoch above which advice is given
SILENCE = 60.0  # seconds after which a line appears, whatever --print-freq says
SHOWN = {"loss": ("loss", ".4g"), "accuracy": ("accuracy", ".3f"), "row_cosine": ("cosine", ".3f"),
         "student_norm": ("norm", ".3g")}  # of a step, on a line
WARM, MEASURED = 4, 12  # the pace is measured between these numbers of steps, for the estimate of the run's time


@dataclass
class Trainer:
    """Runs epochs: one update per batch, and a log line every ``print_freq`` steps; on the screen also after the first
    step, and after a minute without a line.

    ``rate(epoch, step, steps)`` returns the learning rate. ``check`` checks each batch before it is used. ``monitor``
    computes further scalars from the parts of a step; it is called only when they are logged, and in the first
    step of a run. ``watch`` may have something to say of the values of a line.
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
    watch: Callable[[Mapping[str, float]], str] | None = None

    def __post_init__(self) -> None:
        run = self.run
        self.alarm = FiniteAlarm(run.output, run.process.rank, run.modules, run.nonfinite_limit)
        if run.on_nonfinite == "skip":
            self.updater.optimizer.register_step_pre_hook(self._look)
        self.done, self.began, self.bad = 0, time.monotonic(), ""
        self.said = -math.inf  # time of the last line; the first step always prints one
        if run.epoch >= self.epochs:
            run.log.say(f"nothing is left to do: {run.epoch} epochs are done and --epochs is {self.epochs}")
        self.warm = self.began

    def epoch(self, epoch: int, step_of: Callable[[Any], Parts]) -> None:
        """One pass over the loader, starting at ``run.step``, the next step.

        ``step_of(batch)`` is the forward pass; it returns a dict with ``loss`` and other parts. Between steps all ranks
        decide together whether to save or stop (see :meth:`runtime.run.Run.between_steps`).
        """
        run, first = self.run, self.run.step
        run.epoch, steps = epoch, first + len(self.loader)
        meter = Meter(self.loader, steps, self.images_per_step, f"epoch {epoch + 1}/{self.epochs}",
                      run.process.is_main, first)
        batches = iter(meter)
        if not self.done:
            left, images = self._left(epoch, first, steps), self.images_per_step
            run.log.say(f"plan: {left:,} steps of {images:,} images, {left * images:,} in all")
        for step in range(first, steps):
            batch, error = self._next(batches)
            run.between_steps(error)
            rate = self.rate(epoch, step, steps)
            self.alarm.begin(batch, epoch, step)
            with self.updater.autocast():
                parts = step_of(batch)
            self.alarm.watch(parts)
            self.updater.step(parts["loss"], rate)
            run.step, run.steps, self.done = step + 1, run.steps + 1, self.done + 1
            if self._was_skipped():
                parts = {}
            self._say_hours(self._left(epoch, step + 1, steps))
            run.averages.add(parts)
            is_logged = (step + 1) % self.print_freq == 0 or step + 1 == steps
            if self.monitor and parts and is_logged:
                run.averages.add(self.monitor(parts))
            if is_logged:
                self._report(epoch, step + 1, steps, rate, meter)
            elif self._is_due():
                # The first step is shown, and watched, alone; the mean on the next line leaves it out.
                start = self.monitor(parts) if self.monitor and parts and run.steps == 1 else {}
                values = {**run.averages.so_far(start), "lr": rate, **meter.rates(restart=False)}
                self._say(epoch, step + 1, steps, values)
        _, error = self._next(batches)  # after the last batch samplers report what they sampled
        share_error(error, run.process)
        self._say_of_data(epoch, meter.wait_share())

    def _left(self, epoch: int, done: int, steps: int) -> int:
        """The remaining steps of the run, after ``done`` of the ``steps`` of ``epoch``."""
        return (self.epochs - epoch) * steps - done

    def _say_hours(self, left: int) -> None:
        """Log once, after the first steps, how long the run will take."""
        if self.done == WARM:
            self.warm = time.monotonic()
        elif self.done == MEASURED and left:
            pace = (time.monotonic() - self.warm) / (MEASURED - WARM)
            self.run.log.say(f"plan: {left:,} steps are left, {duration(left * pace)} at the pace of the first ones")

    def _next(self, batches: Iterator[Any]) -> tuple[Any, UserError | None]:
        """The next batch, or None after the last; and this rank's error, if any."""
        batch = error = None
        try:
            batch = next(batches, None)
            if batch is not None:
                self.check(batch)
        except UserError as found:
            error = found
        return batch, self.alarm.problem() or error

    def _look(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """With --on-nonfinite skip, before an update: if it is not finite on any rank, clear the gradients, since an
        optimizer skips parameters without one."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self._agreed_bad(gradients):
            optimizer.zero_grad(set_to_none=True)

    def _agreed_bad(self, gradients: list[Tensor]) -> bool:
        said = self.alarm.bad_step(gradients)
        if all_reduce_max([int(bool(said))], self.run.process)[0]:
            self.bad = next(filter(None, gather_objects(said)))
        return bool(self.bad)

    def _was_skipped(self) -> bool:
        """Whether the last step was skipped; then it is undone, but still counted."""
        run = self.run
        if run.on_nonfinite == "stop":
            return False
        if self.alarm.values is not None:  # a gradient scaler skipped the update, and only knows of gradients
            self._agreed_bad([])
        if not self.bad:
            run.skipped = 0
            return False
        run.log.say(f"{self.bad}; the step is skipped")
        self.bad, run.skipped = "", run.skipped + 1
        self.alarm.undo()
        self.alarm.refuse_row(run.skipped)
        return True

    def _say_of_data(self, epoch: int, waited: float) -> None:
        """Log once per epoch what the loader saved, and advice if training waits for it."""
        repeats, advice = (getattr(self.loader, name, str)() for name in ("repeats", "advice"))
        if repeats:
            self.run.log.say(f"epoch {epoch + 1}: {repeats}")
        if advice and waited > WAIT_SHARE:
            self.run.log.say(f"epoch {epoch + 1}: {waited:.0%} of the time was spent waiting for data; {advice}")

    @torch.no_grad()
    def _report(self, epoch: int, done: int, steps: int, rate: float, meter: Meter) -> None:
        values = {**self.run.averages.take(), "lr": rate, **meter.rates()}
        self.run.log.scalars(self.run.steps, epoch, values)
        self._say(epoch, done, steps, values)
        meter.show({"loss": values.get("loss", math.nan)})

    def _is_due(self) -> bool:
        """Whether nothing was printed for long; ranks may differ, so no collective may depend on it."""
        return self.run.process.is_main and time.monotonic() - self.said > SILENCE

    def _say(self, epoch: int, done: int, steps: int, values: Mapping[str, float]) -> None:
        """A line of less than 100 characters; metrics.jsonl has all of the numbers."""
        words = [f"{word} {values[name]:{form}}" for name, (word, form) in SHOWN.items() if name in values]
        words += [f"lr {values['lr']:.3g}", f"{values['images_per_second']:,.0f} img/s"]
        if values["data_wait"] > WAIT_SHARE:
            words.append(f"waits {values['data_wait']:.0%}")
        seconds = (time.monotonic() - self.began) / self.done * self._left(epoch, done, steps)
        self.run.log.say(f"epoch {epoch + 1}/{self.epochs} step {done}/{steps}: {' '.join(words)} "
                         f"eta {duration(seconds)}")
        self.said = time.monotonic()
        if self.watch and (warning := self.watch(values)):
            self.run.log.say(warning)
