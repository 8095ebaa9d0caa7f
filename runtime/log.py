"""What a run leaves and shows: config.json, metrics.jsonl, TensorBoard, a log, a progress bar; and the alarm."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from runtime.device import all_reduce_mean
from runtime.errors import RunStopped
from runtime.state import CONFIG, save_json

METRICS, LOG, NONFINITE = "metrics.jsonl", "log.txt", "nonfinite.json"


class RunLog:
    """The run's folder. On every rank but the first all of it is a no-op, so callers need not ask who they are."""

    def __init__(self, folder: Path, config: dict[str, Any], is_main: bool, first_step: int = 0) -> None:
        """``first_step``: the global step that comes next; what an interrupted run wrote beyond it is dropped."""
        self.is_main, self.folder = is_main, folder
        if not is_main:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only the first rank writes
        save_json(config, folder / CONFIG)
        self._drop_after(folder / METRICS, first_step)
        self.metrics = (folder / METRICS).open("a")
        self.text = (folder / LOG).open("a" if first_step else "w")
        self.board = SummaryWriter(str(folder), purge_step=first_step + 1)

    def say(self, text: str) -> None:
        """A line on the screen and in log.txt."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
            print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=self.text, flush=True)

    def scalars(self, step: int, epoch: int, values: dict[str, float], group: str = "train") -> None:
        """One line of metrics.jsonl and one point a curve. ``step`` counts updates made since the run began."""
        if self.is_main:
            line = {"step": step, "epoch": epoch, "group": group, **values}
            print(json.dumps(line), file=self.metrics, flush=True)
            for name, value in values.items():
                self.board.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Flush and close everything."""
        if self.is_main:
            self.board.close()
            self.metrics.close()
            self.text.close()

    @staticmethod
    def _drop_after(path: Path, first_step: int) -> None:
        if path.exists():
            whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in whole if json.loads(line)["step"] <= first_step and first_step]
            path.write_text("".join(line + "\n" for line in kept))


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
        means = all_reduce_mean(torch.stack([total / self.counts[name] for name, total in self.totals.items()]))
        names = list(self.totals)
        self.totals, self.counts = {}, {}
        return dict(zip(names, means.tolist(), strict=True))


class Meter:
    """Yields the batches of one epoch behind a progress bar, and measures the speed and the wait for data."""

    def __init__(self, loader: Iterable[Any], steps: int, images_per_step: int, label: str, is_main: bool) -> None:
        self.loader, self.images = loader, images_per_step
        self.bar = tqdm(total=steps, desc=label, unit="step", leave=False, disable=None if is_main else True)
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

    def rates(self) -> dict[str, float]:
        """``images_per_second`` over all ranks and ``data_wait``, its share of the time, since the last call."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        rates = {"images_per_second": self.given * self.images / seconds, "data_wait": self.waited / seconds}
        self._restart()
        return rates

    def wait_share(self) -> float:
        """Share of the epoch spent waiting for data, from the first batch on: the start of workers is left out."""
        return self.steady_waited / self.steady if self.steady else 0.0

    def show(self, values: dict[str, float]) -> None:
        """Put a few numbers behind the bar."""
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)

    def _restart(self) -> None:
        self.start, self.waited, self.given = time.perf_counter(), 0.0, 0


class FiniteAlarm:
    """Stops a run whose loss is not finite, one step late so that the device is never waited for."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / (NONFINITE if rank == 0 else f"rank{rank}.{NONFINITE}")
        self.last: tuple[dict[str, Tensor], Tensor, int, int] | None = None

    def watch(self, parts: dict[str, Tensor], indices: Tensor, epoch: int, step: int) -> None:
        """Check the step before this one, and keep this one for the next call."""
        self.check()
        self.last = ({k: v.detach() for k, v in parts.items() if v.ndim == 0}, indices, epoch, step)

    def check(self) -> None:
        """Raise :class:`RunStopped` if the step last watched was not finite, with its parts and indices saved."""
        if self.last is None:
            return
        tensors, indices, epoch, step = self.last
        self.last = None
        if math.isfinite(tensors["loss"]):
            return
        parts = {k: float(v) for k, v in tensors.items()}
        save_json({"epoch": epoch, "step": step, "parts": {k: str(v) for k, v in parts.items()},
                   "indices": indices.tolist()}, self.path)
        said = ", ".join(f"{k} {v:.6g}" for k, v in parts.items())
        raise RunStopped(f"the loss is not finite at epoch {epoch}, step {step} ({said}); the batch's indices are in "
                         f"{self.path}, and the last checkpoint is untouched: lower --lr, or use --amp bf16 or off",
                         every_process=False)


def duration(seconds: float) -> str:
    """``1h02m`` or ``3m07s``."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"
