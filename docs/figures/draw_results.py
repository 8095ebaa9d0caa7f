#!/usr/bin/env python
"""Writes the tables of docs/RESULTS.md and the pictures there and in README.md from docs/results (needs matplotlib).

    python docs/figures/draw_results.py

scripts/compare_methods.sh leaves such records as report.jsonl in its folder; copied (or, for another budget, appended)
to docs/results, they need only this command. A table stands between the lines `<!-- table NAME -->`
and `<!-- end of table -->`; TABLES says how each is made.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from draw_method import COLUMN, FAINT, INK, ROW, STUDENT, TEACHER, panel, write
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from compare_report import Row, course, rows_of, table  # noqa: E402
from report_helpers import deviation, json_lines, spread  # noqa: E402

PAGE = ROOT / "docs/RESULTS.md"
COLOURS = {"teacher": TEACHER, "untrained": "#afb8c1", "coss": STUDENT, "coss:head-init=teacher": "#54aeff",
           "coss_centred": "#8250df", "seed": ROW, "compress": COLUMN, "disco": "#bf3989", "cosine": "#9a6700"}
OTHERS = "#8c959f"
ABLATIONS = {  # what is changed -> entries of METHODS, and what a reader calls them
    "row : space term, weights of sum 2": {
        "coss:l_0=2,l_1=0": "2 : 0, row cosine alone", "coss:l_0=1.5,l_1=0.5": "1.5 : 0.5", "coss": "1 : 1, CoSS",
        "coss:l_0=0,l_1=2": "0 : 2, space similarity alone"},
    "neighbours of an anchor, 64 images a step": {
        "coss@random": "0, 64 random images", "coss:nearest-k=1": "1 of 15", "coss": "3 of 15",
        "coss:total-k=3": "3 of 3, the nearest", "coss:nearest-k=7": "7 of 15", "coss:nearest-k=15": "15 of 15"},
}
SCORES = {"knn": "10-NN top-1 %", "linear": "linear top-1 %", "shared": "11-NN shared %", "cka": "CKA",
          "shifted": "corrupted top-1 %"}
Records = list[dict[str, Any]]


def of(name: str) -> Records:
    """The records of docs/results/NAME.jsonl."""
    return json_lines(ROOT / f"docs/results/{name}.jsonl")


def by_budget(records: Records) -> dict[int, Records]:
    """Students by their number of passes, ascending, each with the teacher's and the untrained students' records."""
    groups: dict[int, Records] = defaultdict(list)
    for record in records:
        if "passes" in record:
            groups[record["passes"]].append(record)
    others = [record for record in records if "passes" not in record]
    return {passes: others + groups[passes] for passes in sorted(groups)}


def shown(name: str) -> str:
    """An entry of METHODS as a reader says it: its loss, and its flags as they are typed."""
    loss, _, flags = name.partition(":")
    return " ".join([loss, *(f"`--{flag.replace('=', ' ')}`" for flag in flags.split(",") if flag)])


def widest(records: Records) -> tuple[dict[str, Row], dict[str, Row]]:
    """Baselines and methods at the budget that most methods were trained with."""
    return max((rows_of(group) for group in by_budget(records).values()), key=lambda rows: len(rows[1]))


def summary(records: Records) -> str:
    """All scores at the budget with most methods."""
    baselines, methods = widest(records)
    scores = [key for key in SCORES if any(row[key] for row in methods.values())]
    header = ["network", "seeds", *(SCORES[key] for key in scores)]
    lines = [header, ["---"] * len(header)]
    for name, row in {**baselines, **methods}.items():
        lines.append([f"*{name}*" if name in baselines else shown(name), str(len(row.records)),
                      *(said(key, row) for key in scores)])
    return markdown(lines)


def said(key: str, row: Row) -> str:
    """A score of all seeds; CKA, a part of 1, with two places more."""
    if key != "cka" or not row[key]:
        return spread(row[key])
    return f"{statistics.mean(row[key]):.3f}" + (f" ± {deviation(row[key]):.3f}" if len(row[key]) > 1 else "")


def detailed(records: Records) -> str:
    """How each method was trained, a table for each budget."""
    return "\n".join(table(*rows_of(group)) for group in by_budget(records).values())


def ablation(records: Records) -> str:
    """One row for each change to CoSS."""
    rows = rows_of(records)[1]
    scores = [key for key in SCORES if any(row[key] for row in rows.values())]
    lines = [["changed", "to", "seeds", *(SCORES[key] for key in scores)]]
    lines.append(["---"] * len(lines[0]))
    for title, entries in ABLATIONS.items():
        lines += [[title, name, str(len(rows[entry].records)), *(said(key, rows[entry]) for key in scores)]
                  for entry, name in entries.items() if entry in rows]
    return markdown(lines)


def settings_tried(records: Records) -> str:
    """One row for each data set, method, number of steps, rate and warm-up."""
    rows: dict[tuple[Any, ...], Row] = defaultdict(Row)
    for record in records:
        rows[tuple(record[key] for key in ("data", "steps", "name", "lr", "warmup"))].records.append(record)
    header = ["data", "steps", "method", "lr", "warm-up", "seeds", SCORES["knn"], "norm", "cosine"]
    lines = [header, ["---"] * len(header)]
    for (data, steps, name, lr, warmup), row in sorted(rows.items(), reverse=True):
        lines.append([data, str(steps), shown(name), f"{lr:g}", f"{warmup} of {row.first['periods']}",
                      str(len(row.records)), spread(row["knn"]), course(row["student_norm"], ".3g"),
                      course(row["row_cosine"], ".2f")])
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    """A table's lines."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "summary": lambda: summary(of("cifar10")),
    "cifar10": lambda: detailed(of("cifar10")),
    "ablation": lambda: ablation(of("ablation")),
    "short trainings": lambda: settings_tried(of("short_trainings")),
}


def filled(text: str) -> str:
    """``text`` with each of its tables made anew."""
    def made(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n\n{TABLES[match[1]]()}\n<!-- end of table -->"
    return re.sub(r"<!-- table (.+?) -->\n.*?<!-- end of table -->", made, text, flags=re.DOTALL)


def clean(axis: Axes) -> None:
    """Thin grey axes, none above and on the right."""
    axis.set_facecolor("none")
    axis.tick_params(labelsize=8, colors=FAINT)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#d0d7de")


def curve() -> Figure:
    """10-NN accuracy against passes: the mean of the seeds, in a band of one standard deviation on either side."""
    records = of("cifar10")
    figure, _ = panel(100, 46)
    axis = figure.add_axes((0.07, 0.13, 0.6, 0.8))
    clean(axis)
    places: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for passes, group in by_budget(records).items():
        for name, row in rows_of(group)[1].items():
            if row["knn"]:
                places[name].append((passes, statistics.mean(row["knn"]), deviation(row["knn"])))
    last = max(passes for points in places.values() for passes, *_ in points)
    for name, points in sorted(places.items(), key=lambda item: -item[1][-1][1]):
        x, y, error = zip(*points, strict=True)
        colour = COLOURS.get(name, OTHERS)
        axis.plot(x, y, color=colour, marker="o", markersize=4, label=shown(name).replace("`", ""),
                  linewidth=2.4 if name.startswith("coss") else 1.4)
        axis.fill_between(x, [a - b for a, b in zip(y, error, strict=True)],
                          [a + b for a, b in zip(y, error, strict=True)], color=colour, alpha=0.15, linewidth=0)
    baselines, _ = rows_of(records)
    for name, row in baselines.items():
        value = statistics.mean(row["knn"])
        axis.axhline(value, color=COLOURS[name], linestyle="--", linewidth=1)
        axis.annotate(f"{name} {value:.1f}", (last, value), xytext=(0, 3), textcoords="offset points", ha="right",
                      fontsize=8, color=INK)
    ticks = sorted({passes for points in places.values() for passes, *_ in points})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("images through the student", fontsize=9, color=INK)
    axis.set_ylabel("10-NN top-1 % on CIFAR-10's test images", fontsize=9, color=INK)
    figure.legend(*axis.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(0.69, 0.55), frameon=False,
                  fontsize=9)
    return figure


def bars(axis: Axes, rows: dict[str, Sequence[float]], title: str, names: Sequence[str] = ()) -> None:
    """One bar a row with its value, the first on top; a row without values stays empty."""
    clean(axis)
    most = max(statistics.mean(values) + deviation(values) for values in rows.values() if values)
    for number, (name, values) in enumerate(rows.items()):
        value, error = statistics.mean(values or [0]), deviation(values)
        axis.barh(number, value, xerr=error or None, color=COLOURS.get(name, OTHERS), height=0.7,
                  error_kw={"ecolor": INK, "lw": 1})
        text = f"{value:.1f}" if values else "–"
        axis.text(value + error + 0.015 * most, number, text, va="center", color=INK, fontsize=8)
    names = names or [shown(name).replace("`", "") for name in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=8.5, color=INK)
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(0, 1.16 * most)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9.5, color=INK, loc="left")


def results() -> Figure:
    """The scores at the budget with most methods, the baselines first."""
    baselines, methods = widest(of("cifar10"))
    figure, _ = panel(110, 36)
    for place, key in enumerate(("knn", "linear", "shared", "shifted")):
        axis = figure.add_axes((0.17 + 0.207 * place, 0.1, 0.18, 0.76))
        bars(axis, {name: row[key] for name, row in {**baselines, **methods}.items()}, SCORES[key])
        if place:
            axis.set_yticklabels([])
    return figure


def ablations() -> Figure:
    """10-NN accuracy and shared neighbours for each change to CoSS, beside CoSS itself."""
    rows = rows_of(of("ablation"))[1]
    figure, _ = panel(110, 50)
    for line, (title, entries) in enumerate(ABLATIONS.items()):
        shown_here = {entry: name for entry, name in entries.items() if entry in rows}
        for place, key in enumerate(("knn", "shared")):
            axis = figure.add_axes((0.24 + 0.39 * place, 0.56 - 0.49 * line, 0.33, 0.34))
            bars(axis, {entry: rows[entry][key] for entry in shown_here}, f"{title}: {SCORES[key]}" if not place
                 else SCORES[key], list(shown_here.values()))
            if place:
                axis.set_yticklabels([])
    return figure


PICTURES: dict[Callable[[], Figure], str] = {  # the table that it shows
    curve: "cifar10", ablations: "ablation", results: "summary"}


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for picture, name in PICTURES.items():
        write(picture, TABLES[name]())


if __name__ == "__main__":
    main()
