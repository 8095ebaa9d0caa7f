"""What a part of benchmarks/gpu.sh is made of: commands with time limits, and what was found."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GRACE = 3.0  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Job:
    """What all parts know. ``work`` is a temporary folder, removed at the end; ``data`` a folder or None."""

    python: str
    device: str
    data: Path | None
    work: Path
    output: Path
    rehearse: bool
    cores: int

    def size(self, full: Any, tiny: Any) -> Any:
        """``full``, or ``tiny`` in a rehearsal."""
        return tiny if self.rehearse else full

    def environment(self, more: dict[str, str]) -> dict[str, str]:
        """Of every command. Nothing is written into the project, and a CPU's rehearsal sees no GPU."""
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}
        return {**os.environ, **hidden, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHON": self.python,
                "NO_VENV": "1", "COSS_DATASETS": str(self.work / "datasets"), **more}


@dataclass(frozen=True)
class Command:
    """One process: ``words`` behind the interpreter, or a whole command line where ``shell``; ``limit`` in seconds."""

    label: str
    words: tuple[object, ...]
    limit: float
    more: dict[str, str] = field(default_factory=dict)
    shell: bool = False


@dataclass
class Found:
    """What a part came to: one line, rows of Markdown, values for gpu.json, and what is wrong ('' for nothing)."""

    figure: str
    rows: list[str]
    values: dict[str, Any]
    wrong: str = ""


@dataclass(frozen=True)
class Part:
    """``least``: seconds without which it is not begun; ``most``: its limit. ``commands`` may write small files into
    the work folder; ``harvest`` reads what the commands left, whatever became of them, and ``close`` keeps of it what a
    second go needs."""

    name: str
    title: str
    least: float
    most: float
    commands: Callable[[Job, float], list[Command]]
    harvest: Callable[[Job], Found]
    close: Callable[[Job], None] = lambda job: None


def run(command: Command, job: Job, log: Path, limit: float) -> tuple[str, float]:
    """Run it, output to ``log``; '' or what went wrong, and the seconds. Whatever it started has ended."""
    words = [str(word) for word in command.words]
    began = time.monotonic()
    with log.open("ab") as said:
        process = subprocess.Popen(words if command.shell else [job.python, *words], cwd=ROOT, stdin=subprocess.DEVNULL,
                                   stdout=said, stderr=subprocess.STDOUT, env=job.environment(command.more),
                                   start_new_session=True)
        try:
            code = process.wait(max(0.1, limit))
            wrong = f"exit code {code}: {last_line(log)}" if code > 0 else f"killed by signal {-code}" if code else ""
        except subprocess.TimeoutExpired:
            wrong = f"stopped after its {limit:.0f} s"
        finally:
            end_session(process)
    return wrong, time.monotonic() - began


def end_session(process: subprocess.Popen) -> None:
    """End all processes of a session, the workers in groups of their own too."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 1.0)):
        until = time.monotonic() + patience
        for pid in members(process.pid):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        while members(process.pid) and time.monotonic() < until:
            process.poll()
            time.sleep(0.05)
    with suppress(subprocess.TimeoutExpired):
        process.wait(1)


def members(session: int) -> list[int]:
    """Processes of a session that still run; Linux."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                state, _, _, its = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(its) == session and state not in "ZX":
                    found.append(int(entry.name))
    return found


def last_line(log: Path) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
