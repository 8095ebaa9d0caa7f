"""The alarm over a loss that is not finite."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from runtime.errors import RunStopped
from runtime.state import save_json

NONFINITE = "nonfinite.json"


class FiniteAlarm:
    """Notices a loss that is not finite, one step late so that the device is never waited for."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / (NONFINITE if rank == 0 else f"rank{rank}.{NONFINITE}")
        self.last: tuple[dict[str, Tensor], Tensor, int, int] | None = None

    def watch(self, parts: dict[str, Tensor], indices: Tensor, epoch: int, step: int) -> None:
        """Keep this step for the next :meth:`problem`."""
        self.last = ({k: v.detach() for k, v in parts.items() if v.ndim == 0}, indices, epoch, step)

    def problem(self) -> RunStopped | None:
        """What is to be said if the step last watched was not finite; its parts and indices are saved."""
        if self.last is None:
            return None
        tensors, indices, epoch, step = self.last
        self.last = None
        if math.isfinite(tensors["loss"]):
            return None
        parts = {k: float(v) for k, v in tensors.items()}
        save_json({"epoch": epoch, "step": step, "parts": {k: str(v) for k, v in parts.items()},
                   "indices": indices.tolist()}, self.path)
        said = ", ".join(f"{k} {v:.6g}" for k, v in parts.items())
        return RunStopped(f"the loss is not finite at epoch {epoch}, step {step} ({said}); the batch's indices are in "
                          f"{self.path}, and the last checkpoint is untouched: lower --lr, or use --amp bf16 or off",
                          every_process=False)
