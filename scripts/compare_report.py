#!/usr/bin/env python
"""The table and the plot of scripts/compare_methods.sh, from the students' results in a folder.

    python scripts/compare_report.py runs/compare

Reads FOLDER/{teacher,untrained-SEED,METHOD-SEED}/{knn,linear}.json, FOLDER/overlap.json and each student's
run/config.json and run/metrics.jsonl, or run/not-finite if there is nothing to score. Writes FOLDER/report.md and
FOLDER/report.png. May be run while students train.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare_work import ENDED

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from losses import needs_of  # noqa: E402
from runtime.errors import UserError, run_script  # noqa: E402

MARKERS = "os^vDP*X<>hd"


@dataclass
class Row:
    """A method, or one of the yardsticks: its scores seed by seed, and how it was trained."""

    knn: list[float] = field(default_factory=list)
    linear: list[float] = field(default_factory=list)
    shared: list[float] = field(default_factory=list)
    curves: list[list[tuple[float, float]]] = field(default_factory=list)  # (image passes, 10-NN) of each seed
    config: dict[str, Any] = field(default_factory=dict)
    ended: int = 0  # seeds whose training stopped at numbers that are not finite

    @property
    def steps(self) -> int:
        """Of one student."""
        return self.config["epochs"] * self.config["epoch_steps"]

    @property
    def passes_a_step(self) -> float:
        """Images through the student in one step."""
        return self.config["batch_size"] * (1 + self.neighbours) * needs_of(self.config["loss"]).passes

    @property
    def neighbours(self) -> int:
        """That an anchor brings."""
        return self.config["nearest_k"] if self.config["sampler"] == "cf" else 0


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def gather(folder: Path) -> tuple[dict[str, Row], dict[str, Row]]:
    """Yardsticks (teacher, untrained) and methods by name, the best 10-NN first."""
    overlap = read(folder / "overlap.json") if (folder / "overlap.json").exists() else {}
    yardsticks: dict[str, Row] = defaultdict(Row)
    methods: dict[str, Row] = defaultdict(Row)
    for path in sorted(folder.glob("*/linear.json")):
        name, run = path.parent.name, path.parent / "run"
        row = (methods if run.is_dir() else yardsticks)[name if name == "teacher" else name.rpartition("-")[0]]
        row.knn.append(read(path.parent / "knn.json")["knn"][0]["top1"])
        row.linear.append(read(path)["metrics"]["top1"])
        if name in overlap:
            row.shared += overlap[name]["shared"].values()
        if run.is_dir():
            row.config = read(run / "config.json")
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            row.curves.append([(x["step"] * row.passes_a_step, x["top1"]) for x in lines if x["group"] == "knn"])
    for run in sorted(path.parent for path in folder.glob(f"*/run/{ENDED}")):
        row = methods[run.parent.name.rpartition("-")[0]]
        row.config, row.ended = read(run / "config.json"), row.ended + 1
    if not any(row.knn for row in methods.values()):
        raise UserError(f"{folder} holds no student that was trained and scored; run scripts/compare_methods.sh first")
    return yardsticks, dict(sorted(methods.items(), key=lambda item: -statistics.mean(item[1].knn or [0])))


def spread(values: list[float]) -> str:
    """``mean ± std`` of several values, the value of one, a dash for none."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "–"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def table(yardsticks: dict[str, Row], methods: dict[str, Row]) -> str:
    """Markdown."""
    first = next(iter(methods.values()))
    lines = [f"Each student: {first.steps * first.passes_a_step:,.0f} image passes.", "",
             "| method | steps | passes a step | lr | seeds | 10-NN top-1 % | linear top-1 % | shared 11-NN % |",
             "|---|---|---|---|---|---|---|---|"]
    for name, row in yardsticks.items():
        lines.append(f"| *{name}* | – | – | – | {len(row.knn)} | {spread(row.knn)} | {spread(row.linear)} | – |")
    for name, row in methods.items():
        near = f" ({row.config['batch_size']} x {1 + row.neighbours})" if row.neighbours else ""
        seeds = f"{len(row.knn)}{f', and {row.ended} whose numbers ended' * bool(row.ended)}"
        lines.append(f"| {name} | {row.steps:,} | {row.passes_a_step:g}{near} | {row.config['lr']:g} | {seeds} "
                     f"| {spread(row.knn)} | {spread(row.linear)} | {spread(row.shared)} |")
    return "\n".join(lines) + "\n"


def picture(folder: Path, yardsticks: dict[str, Row], methods: dict[str, Row]) -> Path | None:
    """10-NN accuracy against image passes, and the linear classifier at the end; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed; pip install matplotlib")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained", width_ratios=(3, 2))
    colours = pyplot.get_cmap("tab20").colors
    start = statistics.mean(yardsticks["untrained"].knn) if "untrained" in yardsticks else None
    methods = {name: row for name, row in methods.items() if row.knn}
    for number, (name, row) in enumerate(methods.items()):
        places = [passes for passes, _ in row.curves[0]]
        columns = [[curve[i][1] for curve in row.curves if len(curve) > i] for i in range(len(places))]
        points = ([(0.0, start, 0.0)] if start is not None else []) + [
            (x, statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
            for x, values in zip(places, columns, strict=True)]
        x, y, error = zip(*points, strict=True)
        style = {"color": colours[number % len(colours)], "label": name, "marker": MARKERS[number % len(MARKERS)]}
        curves.errorbar(x, y, error, capsize=2, markersize=5, linewidth=2.5 if name == "coss" else 1.2, **style)
        linear = statistics.mean(row.linear)
        bars.barh(number, linear, xerr=statistics.stdev(row.linear) if len(row.linear) > 1 else 0,
                  color=style["color"], capsize=2)
        bars.annotate(f"{linear:.1f}", (0, number), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    if "teacher" in yardsticks:
        curves.axhline(yardsticks["teacher"].knn[0], color="#444444", linestyle="--", linewidth=1)
        curves.annotate("teacher", (0, yardsticks["teacher"].knn[0]), xytext=(2, 3), textcoords="offset points")
        bars.axvline(yardsticks["teacher"].linear[0], color="#444444", linestyle="--", linewidth=1)
    if "untrained" in yardsticks:
        bars.axvline(statistics.mean(yardsticks["untrained"].linear), color="#444444", linestyle=":", linewidth=1)
    curves.set(title="10-NN accuracy during training (held-out slice)", xlabel="image passes of the student",
               ylabel="top-1 %", xlim=(0, None))
    figure.legend(loc="outside lower center", frameon=False, ncols=7, fontsize=8)
    bars.set(title="linear classifier at the end", xlabel="top-1 % (dashed: the teacher's, dotted: untrained)")
    bars.set_yticks(range(len(methods)), list(methods))
    bars.invert_yaxis()
    for axis in (curves, bars):
        axis.spines[["top", "right"]].set_visible(False)
    path = folder / "report.png"
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    """Print the table, write table and picture."""
    if len(sys.argv) != 2:
        raise UserError("give one folder, as in: python scripts/compare_report.py runs/compare")
    folder = Path(sys.argv[1])
    yardsticks, methods = gather(folder)
    text = table(yardsticks, methods)
    print(f"\n{text}")
    (folder / "report.md").write_text(text, encoding="utf-8")
    path = picture(folder, yardsticks, methods)
    print(f"table {folder / 'report.md'}" + (f", plot {path}" if path else "")
          + f"; curves: tensorboard --logdir {folder}")


if __name__ == "__main__":
    run_script(main)
