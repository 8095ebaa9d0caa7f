"""A run's folder and progress: opening it, decisions between steps, checkpoints, closing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from runtime.agreement import all_reduce_max, on_first_rank, same_on_every_rank, share_error
from runtime.device import Process, gather_objects, seed_everything
from runtime.errors import NotFinite, RunPaused, RunStopped, UserError
from runtime.folder import refuse_inputs, refuse_other_run
from runtime.job import Interval, RunSettings
from runtime.lock import FolderLock
from runtime.log import Averages, RunLog
from runtime.provenance import start_of, starts_before
from runtime.restore import (
    Stateful,
    alike_on_all,
    differing_buffers,
    load_buffers,
    mean_state,
    refused_unless_it_fits,
    restore_on_all,
)
from runtime.signals import StopSignals, signal_name
from runtime.state import random_state, set_random_state
from runtime.store import CHECKPOINT, Checkpoints, find_resume, load_newest, save_checkpoint

T = TypeVar("T")


@dataclass(frozen=True)
class Description:
    """The identity of a run and what it consists of.

    ``config``: its settings; ``record``: its networks; both go into every checkpoint and export. ``modules``: what a
    checkpoint holds, by name. ``exports``: names of the files that :meth:`Run.save` will write beside it.
    ``resumable``: settings that may differ on resume (:func:`runtime.state.check_same_run`). ``alike``: what else must
    be equal on every rank, by its readable name. ``per_process``: what in its mathematics depends on the number of
    processes, '' for nothing. ``results``: names of the files that are written there at the end. ``flags``: what
    messages call a setting, by its name in ``config``.
    """

    config: Mapping[str, Any]
    record: Mapping[str, Any]
    modules: Mapping[str, Stateful]
    exports: Collection[str] = ()
    resumable: Set[str] = frozenset()
    alike: Mapping[str, str] = field(default_factory=dict)
    per_process: str = ""
    results: Collection[str] = ()
    flags: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Run:
    """A run's folder, log and progress: ``step`` of ``epoch`` is next, ``steps`` were done since the run began."""

    output: Path
    process: Process
    log: RunLog
    checkpoints: Checkpoints
    record: Mapping[str, Any]
    modules: Mapping[str, Stateful]
    interval: Interval
    closing: contextlib.ExitStack
    on_nonfinite: str = "stop"
    nonfinite_limit: int = 10
    epoch: int = 0
    step: int = 0
    steps: int = 0
    skipped: int = 0  # consecutive steps up to now, because they were not finite
    signals: StopSignals = field(default_factory=StopSignals)
    averages: Averages = field(default_factory=Averages)
    saved_steps: int = -1  # as of the last checkpoint, and when it was written
    saved_at: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, settings: RunSettings, what: Description, process: Process, seed: int,
             start_epoch: int | None = None) -> Run:
        """Start in the folder of ``settings``, or resume there from the last step, with all that ``what`` describes.

        A new run starts on every rank with the first rank's tensors and with random numbers from ``seed`` + rank. A
        resumed one restores its modules, its log, and the state of each rank: random numbers, running averages, and
        buffers that differ between ranks. :func:`runtime.device.wrap` changes none of it, so it may come before or
        after; code that draws random numbers to build the run must come before.

        ``start_epoch``: count epochs from there. Until :meth:`finish` or the end of ``process``, this job holds the
        folder's lock, and stop signals are handled between steps. Raises :class:`UserError`, on every rank and before
        anything is written, if the folder is in use or holds a different run, or an input of this one.
        """
        config, volatile, exports, modules = what.config, what.resumable, what.exports, what.modules
        resume = settings.resume
        same_on_every_rank({**{what.flags.get(name, name): value for name, value in config.items()
                               if name not in volatile}, **what.alike}, process)
        folder, closing = Path(settings.output), process.closing.enter_context(contextlib.ExitStack())

        def check(own: bool) -> None:
            refuse_inputs(folder, config, [*exports, *what.results], what.flags)
            if not own:
                refuse_other_run(folder, config, volatile, exports, what.results, start_epoch or 0, what.flags)

        path, state, notes = _find(folder, resume, check, process, what.per_process, closing)
        state = restore_on_all(modules, state, path, process)
        for module in modules.values():  # how auto was resolved
            config.update(getattr(module, "decided", {}))
        epoch, step, steps = (state["epoch"], state["step"], state["steps"]) if state else (0, 0, 0)
        if start_epoch is not None and not (state and resume == "auto"):  # a restart just resumes
            epoch, step = start_epoch, 0
        log = RunLog(folder, config, False)

        def open_log() -> None:
            nonlocal log
            starts = [*(starts_before(folder) if state else []), start_of(process.device)]
            log = RunLog(folder, {**config, "starts": starts}, True, steps, within_epoch=step > 0,
                         log_to=settings.log_to)

        on_first_rank(open_log, process)
        closing.callback(log.close)
        place = {"epoch": epoch, "step": step, "steps": steps, "skipped": state["skipped"] if state else 0}
        in_place = path is not None and path.parent.samefile(folder) and path.name == CHECKPOINT
        run = cls(folder, process, log, Checkpoints(folder, settings.keep, steps if in_place else None),
                  {**what.record, "config": dict(config)}, modules,
                  Interval.parse(settings.save_every), closing, settings.on_nonfinite, settings.nonfinite_limit,
                  **place, saved_steps=steps if in_place else -1)
        closing.enter_context(run.signals)
        log.say(*notes)
        if path:
            log.say(f"resuming from {path} at epoch {epoch + 1}, step {step + 1}")
        run._begin(state, seed)
        return run

    def _begin(self, state: dict[str, Any] | None, seed: int) -> None:
        """Set the tensors and random state of each rank: the first rank's at a new start, otherwise its own.

        If the number of processes has changed, random numbers start anew from (seed, steps, rank), and each rank takes
        the mean of the averages.
        """
        rank = self.process.rank
        if state is None:
            alike_on_all(self.modules)
            seed_everything(seed + rank)
            return
        states, device = state["random"], self.process.device
        with refused_unless_it_fits("the state of each process"):
            if len(states) == self.process.world_size:
                self.averages.load_state_dict(state["averages"][rank], device)
                load_buffers(self.modules, state["buffers"][rank])
                set_random_state(states[rank])
                return
            self.averages.load_state_dict(mean_state(state["averages"]), device)
        words = np.random.SeedSequence((seed, self.steps, rank)).generate_state(1)
        seed_everything(int(words[0]))
        self.log.say(f"the run had {len(states)} processes and now has {self.process.world_size}: steps hold the same "
                     "images, and random numbers start anew on each process")

    def between_steps(self, error: UserError | None = None) -> None:
        """All ranks decide before each step (a collective) whether to save, to stop or to fail.

        ``error``: this rank's error, if any. If a rank has one, raises it on every rank. If a signal asked any rank to
        stop, writes the checkpoint and raises :class:`RunPaused`. A loss that is not finite takes precedence over a
        signal, so that no checkpoint holds its effects; an unreadable image does not.
        """
        error = error or self.log.problem
        severity = 0 if error is None else 2 if isinstance(error, RunStopped) else 1
        due = self.interval.due(self.steps, time.monotonic() - self.saved_at)
        signal, due, severity = all_reduce_max([self.signals.asked, int(due), severity], self.process)
        if severity == 2 or (severity and not signal):
            share_error(error, self.process)
        if (signal or due) and self.saved_steps != self.steps:
            self._write({})
        if signal:
            self.log.say(f"stopped by {signal_name(signal)} before step {self.step + 1} of epoch {self.epoch + 1}; "
                         "start the same command again to resume")
            raise RunPaused

    def scored(self, score: Callable[[], T]) -> T:
        """The result of ``score`` after an epoch. checkpoint.pth is written first: if scoring fails or is killed, the
        epoch is done, and the same command resumes with its score. Raises :class:`RunStopped` for features that are not
        finite, which means that the training has diverged."""
        if self.saved_steps != self.steps:
            self._write({})
        try:
            return score()
        except NotFinite as error:
            raise RunStopped(f"{error.found} after {self.steps} steps, so the training has diverged: start again in "
                             "another folder with a lower learning rate") from None

    def save(self, epoch: int, exports: Mapping[str, Mapping[str, Tensor]]) -> None:
        """After ``epoch``: write checkpoint.pth to resume from, and each of ``exports`` {file name: tensors} to use."""
        self.epoch, self.step = epoch + 1, 0
        self._write(exports)

    def _write(self, exports: Mapping[str, Mapping[str, Tensor]]) -> None:
        # Collectives: every rank contributes its own.
        ranks = {"random": gather_objects(random_state()), "averages": gather_objects(self.averages.state_dict()),
                 "buffers": differing_buffers(self.modules, self.process.rank)}

        def write() -> None:
            self._refuse_broken(exports)
            self.log.sync()
            place = {**self.record, "epoch": self.epoch, "step": self.step, "steps": self.steps,
                     "skipped": self.skipped}
            states = {name: module.state_dict() for name, module in self.modules.items()}
            for name, tensors in exports.items():  # first, since nothing is repeated after the last epoch's checkpoint
                save_checkpoint({**place, "state_dict": dict(tensors)}, self.output / name)
            self.checkpoints.save({**place, **states, **ranks})

        on_first_rank(write, self.process)
        self.saved_steps, self.saved_at = self.steps, time.monotonic()

    def _refuse_broken(self, exports: Mapping[str, Mapping[str, Tensor]]) -> None:
        weights = {f"{name}: {key}": value for name, module in self.modules.items() if isinstance(module, nn.Module)
                   for key, value in module.named_parameters()}
        weights |= {f"{name}: {key}": value for name, tensors in exports.items() for key, value in tensors.items()}
        weights = {name: value for name, value in weights.items() if value.is_floating_point()}
        finite = [torch.isfinite(value).all().to(self.process.device) for value in weights.values()]
        finite = torch.stack(finite).tolist() if finite else []  # the host waits only once
        broken = [name for name, good in zip(weights, finite, strict=True) if not good]
        if broken:
            raise RunStopped(f"the weights are not finite after {self.steps} steps ({broken[0]}); the last "
                             "checkpoint was kept: lower --lr, or use --amp bf16 or off")

    def note(self, epoch: int, group: str, values: dict[str, float], description: str) -> None:
        """Record scalars besides those of training, with a line in the log."""
        self.log.scalars(self.steps, epoch, values, group)
        self.log.say(f"epoch {epoch + 1}: {description}: " + "  ".join(f"{k} {v:.2f}" for k, v in values.items()))

    def finish(self, *lines: str, uses: Sequence[str] = ()) -> None:
        """Log ``lines``, the end of the run, and what can be done with its result (``uses``); close the log, release
        the folder and restore the signal handlers."""
        self.log.say(*lines, f"done: {self.output}", *uses)
        self.closing.close()


def _find(folder: Path, resume: str, check: Callable[[bool], None], process: Process, per_process: str,
          closing: contextlib.ExitStack) -> tuple[Path | None, dict[str, Any] | None, list[str]]:
    """Lock the folder; returns the checkpoint to resume from, its content, and notes. The first rank decides.

    ``check(own)`` checks what the folder holds; ``own``: --resume says that it is this run's, whatever the settings.
    """
    state = None

    def find() -> tuple[Path | None, list[str]]:
        nonlocal state
        paths, own = find_resume(folder, resume), resume in ("auto", "force")
        check(resume == "force" or (resume != "auto" and folder.exists() and paths[0].parent.samefile(folder)))
        loaded = None if own else load_newest(paths)
        lock = FolderLock(folder)
        closing.callback(lock.release)
        for file in folder.glob(".*.tmp"):  # leftovers of a save that was killed
            with contextlib.suppress(OSError):
                file.unlink()
        notes = [f"the lock of {lock.left_by} was left behind and is taken over"] if lock.left_by else []
        paths = find_resume(folder, resume)  # again: until now another job may have held the folder
        if not paths:
            return None, notes
        path, state, damaged = loaded or load_newest(paths)
        before = len(state["random"])
        if per_process and resume == "auto" and before != process.world_size:
            raise UserError(f"--output {folder} holds a run of {before} processes and this has {process.world_size}; "
                            f"{per_process}, so it would be another run: start {before}, or add --resume to force it")
        return path, notes + [f"{line}; the one before it is taken" for line in damaged]

    path, notes = on_first_rank(find, process)
    return path, state, notes
