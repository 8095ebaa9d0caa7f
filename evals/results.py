"""What an evaluation leaves: a line of results.jsonl, and a table."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from runtime.errors import UserError
from runtime.state import write_atomic

RESULTS = "results.jsonl"


def add_result(folder: Path, record: Mapping[str, Any]) -> Path:
    """Add ``record`` and the time to FOLDER/results.jsonl as one line, by one write, so that several evaluations may
    share a folder and a kill leaves whole lines. Returns the file. Raises :class:`UserError` if it cannot be written.
    """
    path = Path(folder) / RESULTS
    line = json.dumps(plain({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **record}), allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            written = os.write(file, line.encode())
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        raise UserError(f"--output: {path} could not be written ({error.strerror or error}); make room or choose "
                        "another folder") from None
    if written != len(line.encode()):
        raise UserError(f"--output: {path} could not be written whole; make room or choose another folder")
    return path


def read_results(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a results.jsonl, oldest first; [] if there is no such file."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue  # cut short by a full disk
    return records


def plain(value: Any) -> Any:
    """``value`` as JSON has it: mappings and lists copied, and numbers that are not finite, which JSON lacks, None."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """What the numbers were computed with."""
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": np.__version__}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as one aligned table: texts to the left, numbers to the right; a column for each key that any row has."""
    names, cells, numeric = _cells(rows)
    widths = [max(len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(names)]

    def line(texts: Sequence[str]) -> str:
        return "  ".join(text.rjust(width) if right else text.ljust(width)
                         for text, width, right in zip(texts, widths, numeric, strict=True)).rstrip()

    return "\n".join([line(names), *map(line, cells)])


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same in Markdown."""
    names, cells, numeric = _cells(rows)
    lines = [names, ["---:" if right else "---" for right in numeric], *cells]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |" for texts in lines)


def save_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """The table as a Markdown file, atomically."""
    return write_atomic(path, lambda file: file.write((markdown(rows) + "\n").encode()) and None)


def _cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]], list[bool]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    numeric = [all(isinstance(row.get(name), (int, float, type(None))) for row in rows) for name in names]
    return names, [[_cell(row.get(name)) for name in names] for row in rows], numeric


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2f}" if 0.1 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"
