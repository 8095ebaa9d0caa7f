#!/usr/bin/env python
"""The table and the picture of scripts/quickstart.sh, made from the results of its runs in a folder.

    python scripts/quickstart_report.py runs/quickstart

Reads FOLDER/teacher.json, FOLDER/student-*.json and FOLDER/untrained-*.json (of compute_knn.py eval --json), the
test features beside them, and FOLDER/student-*/metrics.jsonl. Writes FOLDER/report.md and FOLDER/report.png.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from runtime.start import begin
    begin()

import numpy as np
import torch
from report_helpers import deviation, json_lines, plotting, read, save_picture, spread

from evals.overlap import shared_neighbours
from runtime.errors import UserError, run_script

OVERLAP_K = (1, 5, 10, 20, 50)
GROUPS = {"teacher": "teacher.json", "student (CoSS)": "student-*.json", "untrained student": "untrained-*.json"}


def test_features(result: Path) -> torch.Tensor:
    """Features [m, d] of the test images that ``compute_knn.py eval --features FOLDER/NAME-features`` kept."""
    size = read(result)["test_images"]
    folder = result.with_name(result.stem + "-features")
    arrays = [np.load(path, mmap_mode="r", allow_pickle=False) for path in sorted(folder.glob("features-*.npy"))]
    found = [a for a in arrays if len(a) == size]
    if not found:
        raise UserError(f"{folder} holds no features of {size} test images; run scripts/quickstart.sh again")
    return torch.from_numpy(np.array(found[0]))


def gather(folder: Path) -> dict[str, dict[str, list[Any]]]:
    """For each group the accuracy of every run and its overlap with the teacher at each k."""
    teacher = test_features(folder / "teacher.json")
    groups = {}
    for name, pattern in GROUPS.items():
        results = sorted(folder.glob(pattern))
        if not results:
            raise UserError(f"{folder} holds no {pattern}; run scripts/quickstart.sh again")
        groups[name] = {"arch": [read(r)["arch"] for r in results],
                        "top1": [read(r)["knn"][0]["top1"] for r in results],
                        "overlap": [list(shared_neighbours(teacher, test_features(r), OVERLAP_K).values())
                                    for r in results]}
    return groups


def table(groups: dict[str, dict[str, list[Any]]]) -> str:
    """Markdown."""
    teacher = groups["teacher"]["top1"][0]
    rows = ["| network | arch | seeds | 10-NN top-1 % | of the teacher % | neighbours shared with it % (k=10) |",
             "|---|---|---|---|---|---|"]
    column = OVERLAP_K.index(10)
    for name, group in groups.items():
        shared = [row[column] for row in group["overlap"]]
        rows.append(f"| {name} | {group['arch'][0]} | {len(group['top1'])} | {spread(group['top1'])} | "
                     f"{100 * statistics.mean(group['top1']) / teacher:.0f} | {spread(shared)} |")
    return "\n".join(rows) + "\n"


def picture(folder: Path, groups: dict[str, dict[str, list[Any]]]) -> Path | None:
    """Loss curves, k-NN bars and neighbour overlap, side by side; None without matplotlib."""
    pyplot = plotting()
    if pyplot is None:
        return None
    colours = dict(zip(groups, ("#444444", "#0072b2", "#d55e00"), strict=True))
    figure, (loss, bars, shared) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for path in sorted(folder.glob("student-*/metrics.jsonl")):
        curve = [line for line in json_lines(path) if line["group"] == "train"]
        seed = path.parent.name.rpartition("-")[2]
        loss.plot([x["step"] for x in curve], [x["loss"] for x in curve], label=f"seed {seed}", alpha=0.8)
    loss.set(title="CoSS loss of the student", xlabel="step", ylabel="loss")
    loss.legend(frameon=False)

    for place, (name, group) in enumerate(groups.items()):
        mean = statistics.mean(group["top1"])
        error = deviation(group["top1"])
        bars.bar(place, mean, yerr=error, color=colours[name], capsize=4)
        bars.annotate(f"{mean:.1f}", (place, mean + error), xytext=(0, 2), textcoords="offset points", ha="center")
    bars.set(title="weighted 10-NN accuracy", ylabel="top-1 %", ylim=(0, 105))
    bars.set_xticks(range(len(groups)), [f"{n}\n{g['arch'][0]}" for n, g in groups.items()], fontsize=8)

    for name, group in list(groups.items())[1:]:
        rows = np.array(group["overlap"])
        shared.errorbar(OVERLAP_K, rows.mean(0), rows.std(0), marker="o", label=name, color=colours[name], capsize=3)
    shared.set(title="nearest neighbours shared with the teacher", xlabel="k", ylabel="%", ylim=(0, None), xscale="log")
    shared.set_xticks(OVERLAP_K, [str(k) for k in OVERLAP_K])
    shared.minorticks_off()
    shared.legend(frameon=False)
    return save_picture(figure, (loss, bars, shared), folder / "report.png")


def main() -> None:
    """Print the table, write table and picture."""
    if len(sys.argv) != 2:
        raise UserError("give one folder, as in: python scripts/quickstart_report.py runs/quickstart")
    folder = Path(sys.argv[1])
    groups = gather(folder)
    text = table(groups)
    print(f"\n{text}")
    (folder / "report.md").write_text(text, encoding="utf-8")
    path = picture(folder, groups)
    print(f"table {folder / 'report.md'}" + (f", picture {path}" if path else "")
          + f"; curves: tensorboard --logdir {folder}")


if __name__ == "__main__":
    run_script(main)
