"""Checks a run's folder before the run writes there: it may hold this run, or no files under the names it writes."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from runtime.errors import UserError
from runtime.log import LOG, METRICS
from runtime.regular import open_regular
from runtime.state import CONFIG, check_same_run
from runtime.store import CHECKPOINT, candidates, load_newest

ELSEWHERE = "choose another folder, or move the file away"


def refuse_inputs(folder: Path, config: Mapping[str, Any], exports: Iterable[str], flags: Mapping[str, str]) -> None:
    """Raise :class:`UserError` if the run would overwrite one of its inputs: a value in ``config``, or in one of its
    lists, that is the path of a file to be written in ``folder``, also through a link."""
    written = [folder / name for name in (*exports, CHECKPOINT, CONFIG, METRICS, LOG)]
    written = [path for path in written if path.exists()]
    for key, value in config.items():
        if key in ("output", "resume"):
            continue
        for given in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(given, str) and os.path.isfile(given):  # noqa: PTH113 - no error for text that is not a path
                clash = next((path for path in written if path.samefile(given)), None)
                if clash:
                    raise UserError(f"{flags.get(key, key)} {given} is the file {clash.name} that this run would "
                                    f"write in --output {folder}; choose another folder")


def refuse_other_run(folder: Path, config: Mapping[str, Any], volatile: set[str], exports: Iterable[str],
                     results: Iterable[str] = (), first_epoch: int = 0, flags: Mapping[str, str] | None = None) -> None:
    """Raise :class:`UserError` if ``folder`` holds a run other than ``config`` (by its config.json, its checkpoint or
    one of its ``exports``), files under these names that no run of ours wrote, or this run's result of more than one
    epoch (from ``first_epoch`` on) without a checkpoint, which a new start would overwrite. ``flags``: the
    settings'."""
    same_run = functools.partial(check_same_run, folder, config, volatile, flags=flags or {})
    checkpoints = candidates(folder)
    if checkpoints:
        recorded = None if (folder / CONFIG).exists() else load_newest(checkpoints)[1].get("config", {})
        same_run(recorded)
        return
    same_run(remedy=ELSEWHERE)
    known = (folder / CONFIG).exists()
    for path in (folder / name for name in exports):
        if not path.exists():
            continue
        epoch, recorded = _origin(path)
        if recorded is None:
            raise UserError(f"--output {folder} holds {path.name}, which no such run wrote and this run would replace; "
                            f"{ELSEWHERE}")
        if not known:
            same_run(recorded, ELSEWHERE)
        if epoch > first_epoch + 1:  # one export may precede its checkpoint, if a kill comes between them
            raise UserError(f"--output {folder} holds this run's {path.name} after {epoch} epochs but no checkpoint to "
                            f"resume from, so a new start would replace it; {ELSEWHERE}")
        known = True
    for path in (folder / name for name in (*results, METRICS, LOG)):
        if path.exists() and not known:
            raise UserError(f"--output {folder} holds {path.name} but no {CONFIG} that names its run, and this "
                            f"run would replace it; {ELSEWHERE}")


def _origin(path: Path) -> tuple[int, dict[str, Any] | None]:
    """The epochs and the settings that an export of ours records, or (0, None)."""
    try:
        with open_regular(path) as file:  # by its name torch opens only what has UTF-8 letters
            state = torch.load(file, map_location="cpu", weights_only=True)
        return int(state["epoch"]), dict(state["config"])
    except Exception:  # noqa: BLE001 - torch.load fails in many ways on what is not such a file
        return 0, None
