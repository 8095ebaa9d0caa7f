"""What an evaluation writes: a line of results.jsonl, and a table."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from runtime.errors import UserError, one_line
from runtime.outputs import check_output_file, no_link
from runtime.regular import read_regular
from runtime.screen import LINE
from runtime.state import parse_json, write_atomic

RESULTS = "results.jsonl"


def add_result(folder: Path, record: Mapping[str, Any]) -> Path:
    """Append ``record`` and the time to FOLDER/results.jsonl as one line, even if the last line is incomplete. Several
    evaluations may share a folder. Returns the file. Raises :class:`UserError` if the line cannot be written, and
    leaves the file unchanged.
    """
    path = Path(folder) / RESULTS
    line = json.dumps(plain({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **record}), allow_nan=False) + "\n"
    check_output_file(path, "--output")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0, opener=no_link) as file:  # noqa: PTH123 - Path.open takes no opener
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            _append(file, line.encode())
    except OSError as error:
        raise UserError(f"--output: {path} could not be written ({error.strerror or error}); free some space or choose "
                        "another folder") from None
    return path


def _append(file: BinaryIO, line: bytes) -> None:
    end = file.seek(0, os.SEEK_END)
    if end and os.pread(file.fileno(), 1, end - 1) != b"\n":  # truncated by a kill or saved without a final newline
        line = b"\n" + line
    try:
        while line:
            line = line[file.write(line):]
        os.fsync(file)
    except OSError:
        file.truncate(end)
        raise


def read_results(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a results.jsonl, oldest first; [] without such a file. A sentence on stderr counts the
    others, which a kill has truncated. Raises OSError."""
    if not path.exists():
        return []
    records, lines = [], [line for line in read_regular(path).split(b"\n") if line.strip()]
    for line in lines:
        with contextlib.suppress(ValueError):
            record = parse_json(line)
            if isinstance(record, dict):
                records.append(record)
    if len(records) < len(lines):
        print(f"{path}: {len(lines) - len(records):,} of {len(lines):,} lines are not valid records and are skipped",
              file=sys.stderr)
    return records


def plain(value: Any) -> Any:
    """``value`` as JSON stores it: copied mappings and lists; None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: Sequence[Mapping[str, Any]], columns: int = LINE) -> str:
    """Rows as one aligned table: texts to the left, numbers to the right; a column for each key that any row has.

    Columns that would go beyond ``columns`` characters follow in further blocks, each with the first column again.
    """
    names, cells, numeric = _cells(rows)
    padded = []
    for i, (name, right) in enumerate(zip(names, numeric, strict=True)):
        texts = [name, *(row[i] for row in cells)]
        width = max(map(len, texts))
        padded.append([text.rjust(width) if right else text.ljust(width) for text in texts])
    blocks = [padded[:1]]
    for column in padded[1:]:
        if len(blocks[-1]) > 1 and sum(len(x[0]) + 2 for x in [*blocks[-1], column]) - 2 > columns:
            blocks.append(padded[:1])
        blocks[-1] = [*blocks[-1], column]
    return "\n\n".join("\n".join("  ".join(line).rstrip() for line in zip(*block, strict=True)) for block in blocks)


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
        return one_line(str(value))  # the name of a set is that of a folder
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2f}" if 0.1 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"
