"""What a run records and shows: config.json, metrics.jsonl, TensorBoard, a log, a progress bar."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from runtime.boards import TensorBoard, WeightsAndBiases
from runtime.device import all_reduce_mean
from runtime.errors import UserError, without_codes
from runtime.outputs import check_output_file, no_link
from runtime.state import CONFIG, parse_json, save_json, write_atomic

METRICS, LOG = "metrics.jsonl", "log.txt"


class RunLog:
    """The run's folder. On every rank but the first, all methods are no-ops, so callers need not check their rank.

    A failure to write (a full disk) does not raise here, where other ranks would be left waiting; it is kept in
    ``problem`` for the run to share.
    """

    def __init__(self, folder: Path, config: dict[str, Any], is_main: bool, first_step: int = 0,
                 within_epoch: bool = False, log_to: str = "tensorboard") -> None:
        """``first_step``: the next global step. Lines that an interrupted run wrote beyond it are dropped, and, with
        ``within_epoch``, also per-epoch lines at that step. ``log_to``: one of runtime.boards.BOARDS.
        Raises :class:`UserError` if the folder or a file in it cannot be written."""
        self.is_main, self.folder, self.screen = is_main, folder, True
        self.problem: UserError | None = None
        if not is_main:
            return
        for name in (METRICS, LOG):
            check_output_file(folder / name, "--output")
        save_json(config, folder / CONFIG)
        try:
            dropped = _drop_after(folder / METRICS, first_step, within_epoch)
            self.metrics = _opened(folder / METRICS, "a")
            self.text = _opened(folder / LOG, "a" if first_step else "w")
            self.boards = [TensorBoard(folder, first_step)]
            self.boards += [WeightsAndBiases(folder, config)] if log_to == "wandb" else []
        except OSError as error:
            raise UserError(f"--output {folder} cannot be written ({error.strerror or error}); free some space, or "
                            "choose another folder") from None
        if dropped:
            self.say(f"{folder / METRICS}: {dropped} lines that are not valid or not this run's were dropped")

    def say(self, *lines: str | None, shown: str | None = None) -> None:
        """Lines on the screen, there ``shown`` if it is given, and in log.txt; those without text are left out."""
        for text in filter(None, lines if self.is_main else ()):
            self._show(shown or text)
            with self._noting_trouble():
                line = without_codes(text).replace("\r", "?")
                print(time.strftime("%Y-%m-%d %H:%M:%S"), line, file=self.text, flush=True)

    def _show(self, text: str) -> None:
        """Print while stdout exists; a run survives its terminal, and log.txt has everything."""
        if self.screen:
            try:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()
            except OSError:
                self.screen = False
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for output that is still buffered

    def scalars(self, step: int, epoch: int, values: dict[str, float], group: str = "train") -> None:
        """Write a line of metrics.jsonl and a point of each curve. ``step`` counts updates since the run began, and
        ``epoch`` from 0; metrics.jsonl and all messages count epochs from 1."""
        if self.is_main:
            line = {"step": step, "epoch": epoch + 1, "group": group, **values}
            with self._noting_trouble():
                print(json.dumps(line), file=self.metrics, flush=True)
                for board in self.boards:
                    board.scalars(group, values, step)

    def sync(self) -> None:
        """Flush everything to disk, before a checkpoint records that it was written."""
        if self.is_main:
            with self._noting_trouble():
                os.fsync(self.metrics.fileno())
                for board in self.boards:
                    board.flush()

    def close(self) -> None:
        """Flush and close everything."""
        if self.is_main:
            for file in (*self.boards, self.metrics, self.text):
                with self._noting_trouble():
                    file.close()

    @contextlib.contextmanager
    def _noting_trouble(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.problem = self.problem or UserError(
                f"{self.folder} cannot be written any more ({error.strerror or error}); free some space, and start the "
                "same command again to resume")


def _opened(path: Path, mode: str) -> TextIO:
    return open(path, mode, opener=no_link, encoding="utf-8", errors="surrogateescape")  # noqa: PTH123, SIM115


def _drop_after(path: Path, first_step: int, within_epoch: bool) -> int:
    """Drop the lines of metrics.jsonl after ``first_step``. Returns the number of invalid lines, not counting the last,
    which a kill may have truncated."""
    if not path.exists():
        return 0
    kept, invalid, lines = [], 0, path.read_bytes().split(b"\n")
    for line in lines:
        try:
            record = parse_json(line)
            step, group = int(record["step"]), record["group"]
        except (ValueError, TypeError, LookupError):
            invalid += bool(line.strip()) and line is not lines[-1]
            continue
        if first_step and (step < first_step or (step == first_step and (group == "train" or not within_epoch))):
            kept.append(line + b"\n")
    write_atomic(path, lambda file: file.write(b"".join(kept)) and None)
    return invalid if first_step else 0


class Averages:
    """Running means of named scalars. They stay on the device until :meth:`take` reads them."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, parts: dict[str, Tensor]) -> None:
        """Add one step's scalars; tensors that are not scalars are passed over."""
        for name, value in parts.items():
            if value.ndim == 0:
                self.totals[name] = self.totals.get(name, 0.0) + value.detach().float()
                self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """Means since the last call, over steps and ranks (a collective: every rank calls it)."""
        if not self.totals:
            return {}
        means = all_reduce_mean(self._means())
        names = list(self.totals)
        self.totals, self.counts = {}, {}
        return dict(zip(names, means.tolist(), strict=True))

    def so_far(self, also: Mapping[str, Tensor]) -> dict[str, float]:
        """This rank's means since the last :meth:`take`, which the next one includes too, and the scalars ``also``."""
        if not self.totals:
            return {}
        values = torch.cat([self._means(), *(value.detach().float().view(1) for value in also.values())])
        return dict(zip([*self.totals, *also], values.tolist(), strict=True))

    def _means(self) -> Tensor:
        """This rank's, on the device, in the order of ``totals``."""
        return torch.stack([total / self.counts[name] for name, total in self.totals.items()])

    def state_dict(self) -> dict[str, Any]:
        """This rank's sums and counts since the last :meth:`take`."""
        return {"totals": {name: total.cpu() for name, total in self.totals.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """The inverse of :meth:`state_dict`."""
        self.totals = {name: total.to(device) for name, total in state["totals"].items()}
        self.counts = dict(state["counts"])


class Meter:
    """Yields the batches of one epoch behind a progress bar, and measures the speed and the wait for data."""

    def __init__(self, loader: Iterable[Any], steps: int, images_per_step: int, label: str, is_main: bool,
                 first: int = 0) -> None:
        """``steps`` in the epoch; the loader begins at ``first``."""
        self.loader, self.images = loader, images_per_step
        self.bar = tqdm(total=steps, initial=first, desc=label, unit="step", leave=False,
                        disable=None if is_main else True)
        self.steady_waited = self.steady = 0.0
        self._restart()

    def __iter__(self) -> Iterator[Any]:
        iterator, first = iter(self.loader), None
        with self.bar:
            while True:
                asked = time.perf_counter()
                batch = next(iterator, None)
                now = time.perf_counter()
                self.waited += now - asked
                if batch is None:
                    return
                if first is None:
                    first = now
                else:
                    self.steady_waited += now - asked
                    self.steady = now - first
                self.given += 1
                yield batch
                self.bar.update()

    def rates(self, restart: bool = True) -> dict[str, float]:
        """``images_per_second`` over all ranks and ``data_wait``, its share of the time, since the last ``restart``."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        rates = {"images_per_second": self.given * self.images / seconds, "data_wait": self.waited / seconds}
        if restart:
            self._restart()
        return rates

    def wait_share(self) -> float:
        """Share of the epoch spent waiting for data after the first batch, so without the start of the workers."""
        return self.steady_waited / self.steady if self.steady else 0.0

    def show(self, values: dict[str, float]) -> None:
        """Put a few numbers behind the bar."""
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)

    def _restart(self) -> None:
        self.start, self.waited, self.given = time.perf_counter(), 0.0, 0


def duration(seconds: float) -> str:
    """``1,274h02m`` or ``3m07s``."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60:,}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"
