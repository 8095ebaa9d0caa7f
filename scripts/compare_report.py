#!/usr/bin/env python
"""The table and the plot of scripts/compare_methods.sh, made from the students' results in a folder.

    python scripts/compare_report.py runs/compare

Reads FOLDER/{teacher,untrained-SEED,METHOD-SEED}/{knn,linear}.json, FOLDER/overlap.json and each student's
run/config.json and run/metrics.jsonl, or run/not-finite if there is nothing to score. Writes FOLDER/report.md,
FOLDER/report.png, and FOLDER/report.jsonl with one line for each network. May be run while students train.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from runtime.start import begin
    begin()

from compare_work import ENDED
from report_helpers import deviation, json_lines, plotting, read, save_picture, spread

from losses import needs_of
from runtime.errors import UserError, run_script

MARKERS = "os^vDP*X<>hd"
YARDSTICKS = ("teacher", "untrained")
LOGGED = ("student_norm", "row_cosine")
MADE_BY = ("hardware", "torch", "commit")


@dataclass
class Row:
    """A method, or one of the baselines: the ``records`` of its seeds."""

    records: list[dict[str, Any]] = field(default_factory=list)

    def __getitem__(self, key: str) -> list[Any]:
        """What each seed that has it has under ``key``."""
        return [record[key] for record in self.records if record.get(key) is not None]

    @property
    def first(self) -> dict[str, Any]:
        """For what all seeds share."""
        return self.records[0]


def gather(folder: Path) -> list[dict[str, Any]]:
    """One record of plain values for each network in the folder, see :func:`record_of`."""
    overlap = read(folder / "overlap.json") if (folder / "overlap.json").exists() else {}
    paths = {path.parent for name in ("*/linear.json", f"*/run/{ENDED}") for path in folder.glob(name)}
    scored = {path if (path / "linear.json").exists() else path.parent for path in paths}
    records = [record_of(path, overlap.get(path.name, {})) for path in sorted(scored)]
    if not any(record["name"] not in YARDSTICKS and record["knn"] is not None for record in records):
        raise UserError(f"{folder} holds no student that was trained and scored; run scripts/compare_methods.sh first")
    return records


def record_of(folder: Path, overlap: Mapping[str, Any]) -> dict[str, Any]:
    """``name`` and ``seed``; ``knn`` (k = 10, T = 0.07), ``linear``, ``shared`` in %, None where the numbers ended;
    what :func:`shifted` returns, if there is a shifted.json; and of a student its CKA with the teacher and how it was
    trained, on what, with its norm and cosine to the teacher at the ends of the first and last period.
    """
    name, _, seed = folder.name.rpartition("-")
    record: dict[str, Any] = {"name": name or folder.name, "seed": int(seed) if name else None, "knn": None,
                              "linear": None, "shared": None}
    if (folder / "linear.json").exists():
        record |= {"knn": read(folder / "knn.json")["knn"][0]["top1"],
                   "linear": read(folder / "linear.json")["metrics"]["top1"],
                   "shared": next(iter(overlap.get("shared", {}).values()), None), "cka": overlap.get("cka_unbiased")}
    if (folder / "shifted.json").exists():
        record |= shifted(read(folder / "shifted.json")["metrics"])
    if (folder / "run").is_dir():
        config = read(folder / "run/config.json")
        near = config["nearest_k"] if config["sampler"] == "cf" else 0
        each = config["batch_size"] * (1 + near) * needs_of(config["loss"]).passes  # images through the student a step
        lines = json_lines(folder / "run/metrics.jsonl")
        train = [line for line in lines if line["group"] == "train"]
        start = config["starts"][-1]
        record |= {"data": Path(config["data"]).name, "subset": config["subset"], "image_size": config["image_size"],
                   "student": config["student_arch"], "teacher": config["teacher_arch"],
                   "teacher_sha256": config["teacher_sha256"], "precision": config["precision"],
                   **{key: start[key] for key in MADE_BY},
                   "passes": round(config["epochs"] * config["epoch_steps"] * each),
                   "images_per_second": statistics.median(line["images_per_second"] for line in train),
                   "lr": config["lr"], "warmup": config["warmup_epochs"], "periods": config["epochs"],
                   "steps": config["epochs"] * config["epoch_steps"], "passes_a_step": each,
                   "anchors": config["batch_size"], "neighbours": near,
                   "curve": [[x["step"] * each, x["top1"]] for x in lines if x["group"] == "knn"],
                   **{key: [line.get(key) for line in (train[:1] + train[-1:])] for key in LOGGED}}
    return record


def shifted(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """``shifted`` and ``corruptions`` of a record: top-1 in %, the mean of the corruptions and of their severities."""
    corruptions = {name: 100 - statistics.mean(errors.values())
                   for name, errors in metrics["corruptions"]["shifted"]["errors"].items()}
    return {"shifted": statistics.mean(corruptions.values()), "corruptions": corruptions}


def rows_of(records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Row], dict[str, Row]]:
    """Baselines (teacher, untrained) and methods by name, the best 10-NN first."""
    rows: dict[str, Row] = defaultdict(Row)
    for record in records:
        rows[record["name"]].records.append(record)
    order = sorted(rows, key=lambda name: -statistics.mean(rows[name]["knn"] or [0]))
    return ({name: rows[name] for name in YARDSTICKS if name in rows},
            {name: rows[name] for name in order if name not in YARDSTICKS})


def table(yardsticks: dict[str, Row], methods: dict[str, Row]) -> str:
    """Markdown."""
    first = next(iter(methods.values())).first
    lines = [f"Each student: {first['steps'] * first['passes_a_step']:,.0f} image passes.", "",
             "| method | steps | passes a step | lr | warm-up | seeds | 10-NN top-1 % | linear top-1 % "
             "| shared 11-NN % | norm | cosine |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for name, row in yardsticks.items():
        lines.append(f"| *{name}* | – | – | – | – | {len(row['knn'])} | {spread(row['knn'])} | {spread(row['linear'])} "
                     "| – | – | – |")
    for name, row in methods.items():
        one, ended = row.first, len(row.records) - len(row["knn"])
        near = f" ({one['anchors']} x {1 + one['neighbours']})" if one["neighbours"] else ""
        seeds = f"{len(row['knn'])}{f', and {ended} whose numbers ended' * bool(ended)}"
        lines.append(f"| {name} | {one['steps']:,} | {one['passes_a_step']:g}{near} | {one['lr']:g} "
                     f"| {one['warmup']} of {one['periods']} | {seeds} | {spread(row['knn'])} "
                     f"| {spread(row['linear'])} | {spread(row['shared'])} | {course(row['student_norm'], '.3g')} "
                     f"| {course(row['row_cosine'], '.2f')} |")
    return "\n".join(lines) + "\n"


def course(values: list[list[float | None]], form: str) -> str:
    """The mean over the seeds at both ends of the training, as ``first → last``; a dash where it was not logged."""
    logged = [ends for ends in values if ends and None not in ends]
    return " → ".join(format(statistics.mean(column), form) for column in zip(*logged, strict=True)) or "–"


def picture(folder: Path, yardsticks: dict[str, Row], methods: dict[str, Row]) -> Path | None:
    """10-NN accuracy against image passes, and the linear classifier at the end; None without matplotlib."""
    pyplot = plotting()
    if pyplot is None:
        return None
    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained", width_ratios=(3, 2))
    colours = pyplot.get_cmap("tab20").colors
    start = statistics.mean(yardsticks["untrained"]["knn"]) if "untrained" in yardsticks else None
    methods = {name: row for name, row in methods.items() if row["knn"]}
    for number, (name, row) in enumerate(methods.items()):
        places = [passes for passes, _ in row["curve"][0]]
        columns = [[curve[i][1] for curve in row["curve"] if len(curve) > i] for i in range(len(places))]
        points = ([(0.0, start, 0.0)] if start is not None else []) + [
            (x, statistics.mean(values), deviation(values))
            for x, values in zip(places, columns, strict=True)]
        x, y, error = zip(*points, strict=True)
        style = {"color": colours[number % len(colours)], "label": name, "marker": MARKERS[number % len(MARKERS)]}
        curves.errorbar(x, y, error, capsize=2, markersize=5, linewidth=2.5 if name == "coss" else 1.2, **style)
        linear = statistics.mean(row["linear"])
        bars.barh(number, linear, xerr=deviation(row["linear"]),
                  color=style["color"], capsize=2)
        bars.annotate(f"{linear:.1f}", (0, number), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    if "teacher" in yardsticks:
        curves.axhline(yardsticks["teacher"]["knn"][0], color="#444444", linestyle="--", linewidth=1)
        curves.annotate("teacher", (0, yardsticks["teacher"]["knn"][0]), xytext=(2, 3), textcoords="offset points")
        bars.axvline(yardsticks["teacher"]["linear"][0], color="#444444", linestyle="--", linewidth=1)
    if "untrained" in yardsticks:
        bars.axvline(statistics.mean(yardsticks["untrained"]["linear"]), color="#444444", linestyle=":", linewidth=1)
    curves.set(title="10-NN accuracy during training (held-out slice)", xlabel="image passes of the student",
               ylabel="top-1 %", xlim=(0, None))
    figure.legend(loc="outside lower center", frameon=False, ncols=7, fontsize=8)
    bars.set(title="linear classifier at the end", xlabel="top-1 % (dashed: the teacher's, dotted: untrained)")
    bars.set_yticks(range(len(methods)), list(methods))
    bars.invert_yaxis()
    return save_picture(figure, (curves, bars), folder / "report.png")


def main() -> None:
    """Print the table; write table, plot and the records behind them."""
    if len(sys.argv) != 2:
        raise UserError("give one folder, as in: python scripts/compare_report.py runs/compare")
    folder = Path(sys.argv[1])
    records = gather(folder)
    yardsticks, methods = rows_of(records)
    text = table(yardsticks, methods)
    print(f"\n{text}")
    (folder / "report.md").write_text(text, encoding="utf-8")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "report.jsonl").write_text(lines, encoding="utf-8")
    path = picture(folder, yardsticks, methods)
    print(f"table {folder / 'report.md'}" + (f", plot {path}" if path else "")
          + f"; records {folder / 'report.jsonl'}; curves: tensorboard --logdir {folder}")


if __name__ == "__main__":
    run_script(main)
