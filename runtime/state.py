"""Files that are whole or not there, random states, and whether a folder holds this very run."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from runtime.device import gather_objects
from runtime.errors import UserError

CHECKPOINT, CONFIG = "checkpoint.pth", "config.json"
# Flags that may differ between a run and its continuation without making it another run: where things lie (what
# they are is known by fingerprint) and how the work is done.
VOLATILE = {"data", "output", "resume", "workers", "print_freq", "device", "knn_every", "knn_data", "start_epoch",
            "distributed", "local_rank", "on_bad_image", "amp", "processes", "teacher", "data_path", "cache",
            "image_cache"}


def write_atomic(path: Path, write: Callable[[BinaryIO], None]) -> Path:
    """Write through a temporary file in the same folder, fsync, and rename: a reader sees all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror or error}); make room or choose another folder"
                        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def save_checkpoint(state: dict[str, Any], path: Path) -> Path:
    """``torch.save``, atomically. ``state`` holds tensors and plain values only, so that it loads safely."""
    return write_atomic(path, lambda file: torch.save(state, file))


def save_json(value: Any, path: Path) -> Path:
    """Indented JSON, atomically."""
    text = json.dumps(value, indent=2) + "\n"
    return write_atomic(path, lambda file: file.write(text.encode()) and None)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of :func:`save_checkpoint`, on the CPU; raises :class:`UserError` if it is damaged."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"epoch", "steps", "random"} <= state.keys():
            raise ValueError("not a training checkpoint")
        return state
    except Exception as error:  # torch.load fails in many ways on a damaged file; each means the same to a person
        raise UserError(f"--resume {path} could not be read ({type(error).__name__}); it is damaged or not a "
                        "checkpoint of this project, remove it to start anew") from None


def random_state() -> list[dict[str, Any]]:
    """Every rank's random state (Python, NumPy, torch, its card), in rank order, as tensors and plain values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": [list(random.getstate()[1]), random.getstate()[2]], "torch": torch.get_rng_state(),
        "numpy": {"keys": torch.from_numpy(keys.astype(np.int64)), "rest": [position, has_gauss, gauss]}}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return gather_objects(state)


def set_random_state(states: list[dict[str, Any]], rank: int, world_size: int) -> bool:
    """Restore this rank's state; False, and nothing done, if the run had another number of processes."""
    if len(states) != world_size:
        return False
    state = states[rank]
    words, gauss = state["python"]
    random.setstate((3, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    np.random.set_state(("MT19937", state["numpy"]["keys"].numpy().astype(np.uint32), *state["numpy"]["rest"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    return True


def find_resume(output: Path, resume: str, config: Mapping[str, Any], volatile: set[str]) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start.

    ``resume``: ``auto`` goes on if ``output`` holds this very run; ``force`` goes on with changed settings;
    anything else is the path of a checkpoint. ``config`` is what this run is; keys in ``volatile`` may differ.
    Raises :class:`UserError` if ``output`` holds a different run.
    """
    if resume not in ("auto", "force"):
        if not Path(resume).is_file():
            raise UserError(f"--resume {resume} is not a file; give a {CHECKPOINT}, or leave the flag out to go on "
                            "from --output")
        return Path(resume)
    checkpoint = output / CHECKPOINT
    if resume == "force" and not checkpoint.exists():
        raise UserError(f"--resume: {output} holds no {CHECKPOINT} to go on from; leave the flag out to start there")
    if resume == "auto" and checkpoint.exists() and (output / CONFIG).exists():
        before = _read_config(output / CONFIG)
        changed = [f"{key} was {before.get(key)!r}, now {value!r}" for key, value in json.loads(
            json.dumps(dict(config))).items() if key not in volatile and before.get(key) != value]
        if changed:
            raise UserError(f"--output {output} holds a different run ({'; '.join(changed[:4])}); choose another "
                            "folder, or add --resume to go on from its checkpoint with the new settings")
    return checkpoint if checkpoint.exists() else None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not readable JSON, so --output may hold a different run; "
                        "choose another folder or remove it")
    return config
