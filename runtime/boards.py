"""Where the curves of a run are drawn: TensorBoard, and Weights & Biases where --log-to asks for it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.packages import need_package

BOARDS = ("tensorboard", "wandb")


def check_board(name: str, flag: str = "--log-to") -> None:
    """Raise :class:`UserError` if the library of ``name`` is missing."""
    if name != "tensorboard":
        need_package(name, f"{flag} {name}", otherwise="leave the flag out (TensorBoard and metrics.jsonl are always "
                                                       "written)")


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only the first rank writes
        self.writer = SummaryWriter(_utf8_name(folder), purge_step=first_step + 1)

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """A point of each curve."""
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)

    def flush(self) -> None:
        """To disk."""
        self.writer.flush()

    def close(self) -> None:
        """The end."""
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, whose files lie in wandb/ in the run's folder; the environment says the rest
    (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline). A resumed run goes on in the same curves."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Raises :class:`UserError` where the library does not start, for example without a login."""
        import wandb

        first = json.dumps(config.get("starts", [None])[0])  # of all starts of the run, the same whenever it resumes
        try:
            self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", "coss"), name=folder.resolve().name,
                                  id=hashlib.sha256(first.encode()).hexdigest()[:16], resume="allow", dir=str(folder),
                                  config=dict(config), settings={"console": "off"})
            self.run.define_metric("*", step_metric="step")
        except Exception as error:  # noqa: BLE001 - its errors are many, and differ between versions
            raise UserError(f"--log-to wandb: it does not start ({type(error).__name__}: "
                            f"{' '.join(str(error).split())[:160]}); log in (wandb login), or set WANDB_MODE=offline"
                            ) from None

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """A point of each curve, with its own step: its count may only grow, and a resumed run goes back."""
        self.run.log({**{f"{group}/{name}": value for name, value in values.items()}, "step": step})

    def flush(self) -> None:
        """It does so itself."""

    def close(self) -> None:
        """The end."""
        self.run.finish()


def _utf8_name(folder: Path) -> str:
    """A name of ``folder`` for TensorBoard, which supports only UTF-8 names."""
    try:
        os.fsencode(folder).decode()
    except UnicodeDecodeError:
        return f"/proc/self/fd/{os.open(folder, os.O_RDONLY | os.O_DIRECTORY)}"  # for the life of the process
    return str(folder)
