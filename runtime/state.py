"""Atomic file writes, the random state, and whether a folder holds this run."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import torch

from runtime.errors import UserError
from runtime.outputs import new_file
from runtime.regular import read_regular

CONFIG = "config.json"
REMEDY = "choose another folder, or add --resume to continue from its checkpoint with the new settings"


def write_atomic(path: Path, write: Callable[[BinaryIO], None]) -> Path:
    """Write a temporary file in the same folder, fsync, and rename: a reader sees all of it or nothing.

    Replaces only regular files; a symbolic link is replaced by the file. Raises :class:`UserError`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError("a folder, a device or a pipe is there")
        with open(temporary, "wb", opener=new_file) as file:  # noqa: PTH123 - Path.open takes no opener
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror or error}); free some space or choose "
                        "another folder") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def save_json(value: Any, path: Path) -> Path:
    """Indented JSON, atomically."""
    text = json.dumps(value, indent=2) + "\n"
    return write_atomic(path, lambda file: file.write(text.encode()) and None)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for anything that is not JSON, including text that is not UTF-8 and
    nesting that is too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def load_json(path: Path) -> Any:
    """The value in a JSON file. Raises OSError and, like :func:`parse_json`, ValueError."""
    return parse_json(read_regular(path))


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power failure, if the system supports that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def random_state() -> dict[str, Any]:
    """This process's random state (Python, NumPy, torch, its GPU), as tensors and plain values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": [list(random.getstate()[1]), random.getstate()[2]], "torch": torch.get_rng_state(),
        "numpy": {"keys": torch.from_numpy(keys.astype(np.int64)), "rest": [position, has_gauss, gauss]}}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore this rank's state, one of :func:`random_state`'s."""
    words, gauss = state["python"]
    random.setstate((3, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    np.random.set_state(("MT19937", state["numpy"]["keys"].numpy().astype(np.uint32), *state["numpy"]["rest"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def check_same_run(output: Path, config: Mapping[str, Any], volatile: set[str],
                   recorded: Mapping[str, Any] | None = None, remedy: str = REMEDY,
                   flags: Mapping[str, str] = MappingProxyType({})) -> None:
    """Raises :class:`UserError`, which ends with ``remedy``, if ``output`` holds a run with settings other than
    ``config``, by its config.json or, if that is missing, by what a checkpoint or an export has ``recorded``.

    Keys in ``volatile`` may differ. ``flags``: what the message calls a setting, by its name.
    """
    if (output / CONFIG).exists():
        recorded = _read_config(output / CONFIG)
    if recorded is None:
        return
    before = _singly(_as_json(recorded))
    changed = [f"{_called(key, flags)} was {before.get(key)!r}, now {value!r}"
               for key, value in _singly(_as_json(config)).items()
               if key.partition(".")[0] not in volatile and before.get(key) != value]
    if changed:
        raise UserError(f"--output {output} holds a different run ({'; '.join(changed[:4])}); {remedy}")


def _called(key: str, flags: Mapping[str, str]) -> str:
    """The flag of a setting; of one of several losses with the loss."""
    first, _, last = key.rpartition(".")
    owner = f" of {first.removeprefix('losses.')}" if first.startswith("losses.") else ""
    return flags[last] + owner if last in flags and (owner or not first) else key


def _singly(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested settings under dotted names: {"losses.coss.s_temp": 0.1}."""
    found = {}
    for key, value in config.items():
        found |= _singly(value, f"{before}{key}.") if isinstance(value, dict) and value else {f"{before}{key}": value}
    return found


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(config)))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = load_json(path)
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not readable JSON, so --output may hold a different run; "
                        "choose another folder or remove it")
    return config
