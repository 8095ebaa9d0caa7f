"""What the reports of scripts/quickstart.sh and scripts/compare_methods.sh share."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file with one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def spread(values: Sequence[float]) -> str:
    """``mean ± std`` of several values, the value of one, a dash for none."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "–"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def deviation(values: Sequence[float]) -> float:
    """The standard deviation, 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def plotting() -> Any:
    """matplotlib.pyplot, drawing into files; None, with a sentence, where it is not installed."""
    from runtime.errors import UserError  # here, where the script has put the repository on the path
    from runtime.packages import need_package

    try:
        matplotlib = need_package("matplotlib", "it")
    except UserError as error:
        print(f"no picture: {error}")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_picture(figure: Any, axes: Iterable[Any], path: Path) -> Path:
    """The figure, its ``axes`` without a frame above and on the right."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return path
