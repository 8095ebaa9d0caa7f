"""How a result was made: versions, machine, commit, command."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from runtime.state import CONFIG, load_json

ROOT = Path(__file__).resolve().parents[1]


def versions() -> dict[str, str]:
    """The versions of the libraries that computed the numbers."""
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": np.__version__}


def start_of(device: torch.device) -> dict[str, Any]:
    """This start of a script, in plain values: time, command, commit, versions and hardware."""
    return {"time": time.strftime("%Y-%m-%d %H:%M:%S %z"), "command": shlex.join(sys.argv), "commit": commit(),
            **versions(), "hardware": hardware(device)}


def hardware(device: torch.device) -> str:
    """The name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str | None:
    """The commit of the code, with a plus sign if tracked files were changed since; None outside a git checkout."""
    if not (ROOT / ".git").exists():
        return None
    try:
        head, changed = (subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, timeout=10,
                                        check=True).stdout.strip()
                         for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]))
    except (OSError, subprocess.SubprocessError):
        return None
    return head + "+" * bool(changed)


def starts_before(folder: Path) -> list[Any]:
    """The ``starts`` in ``folder``/config.json; empty if it cannot be read."""
    try:
        starts = load_json(folder / CONFIG)["starts"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return starts if isinstance(starts, list) else []
