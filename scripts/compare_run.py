#!/usr/bin/env python
"""What scripts/compare_methods.sh runs: its header says what is compared and how. Trains, scores, resumes, reports."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from runtime.start import begin
    begin()

from compare_plan import Budget, read_tuned
from compare_search import search
from compare_work import PYTHON, Children, Comparison, ended

from losses import LOSSES
from runtime.errors import RunPaused, run_script
from runtime.hardware import AMP
from runtime.numbers import number

ROOT = Path(__file__).resolve().parents[1]
OVERLAP_K, OVERLAP_IMAGES = 11, 2000


LEAST = {"passes": 1, "epochs": 1, "batch": 1, "nearest-k": 0, "total-k": 0, "queue": 1, "every": 0, "gpus": 1,
         "jobs": 0, "workers": 0}  # whole numbers


class Variables(argparse.ArgumentParser):
    """Flags that scripts/compare_methods.sh builds from its variables; errors name the variables."""

    def error(self, message: str) -> NoReturn:
        named = re.sub(r"argument --([a-z-]+):", lambda flag: flag[1].upper().replace("-", "_") + ":", message)
        self.exit(2, f"error: {named}\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """scripts/compare_methods.sh sets all of them."""
    parser = Variables(description=__doc__, allow_abbrev=False)
    for name in ("data", "teacher", "output", "student", "stem", "rates"):
        parser.add_argument(f"--{name}", required=True)
    for name, least in LEAST.items():
        parser.add_argument(f"--{name}", required=True, type=number(int, least))
    parser.add_argument("--subset", required=True, type=number(float, above=0, most=1))
    parser.add_argument("--shifted", required=True)
    parser.add_argument("--minutes", required=True, type=number(float, 0))
    parser.add_argument("--methods", required=True, nargs="*")
    parser.add_argument("--seeds", required=True, nargs="+", type=number(int, 0))
    parser.add_argument("--factor", required=True, type=number(float, above=1))
    parser.add_argument("--amp", required=True, choices=AMP)
    parser.add_argument("--search", action="store_true")
    args = parser.parse_args(argv)
    args.methods = args.methods or list(LOSSES)
    return args


def compare(args: argparse.Namespace, children: Children) -> None:
    """Everything, then the table."""
    folder = Path(args.output)
    budget = Budget(args.passes, args.epochs, args.batch, args.nearest_k, args.total_k).rounded()
    c = Comparison(args, folder, budget, children)
    tuned = read_tuned(args.methods, [folder / "rates.txt", Path(args.rates)])
    c.same_settings()
    for entry, found in tuned.items():
        print(f"{entry}: rate {found.rate:g}, warm-up {found.warmup} of {args.epochs} periods, from {found.file}")
    print("1/3 the teacher's neighbours and scores, and an untrained student's")
    c.mine(args.data)
    c.score(folder / "teacher", "--weights", args.teacher)
    scoring, began = folder / "scoring.json", time.monotonic()
    c.untrained(args.seeds[0])
    if not scoring.exists():  # for the estimate below; too short if an earlier start was stopped in the middle
        scoring.write_text(json.dumps(time.monotonic() - began), encoding="utf-8")
    left = [(entry, seed) for seed in args.seeds for entry in args.methods
            if not c.scored(folder / f"{entry}-{seed}") and not ended(folder / f"{entry}-{seed}/run")]
    seconds = 0.0
    if left:
        speed = c.measure(args.methods[0], args.data)
        seconds = budget.passes / speed + 2 * json.loads(scoring.read_text(encoding="utf-8"))  # once in training too
        print(f"2/3 {len(left)} students of {budget.passes:,} image passes, {c.jobs} side by side; at {speed:.0f} "
              "passes a second each, as measured, and with the scores about "
              f"{len(left) / c.jobs * seconds / 60:.0f} minutes")
        work = [lambda slot, e=entry, s=seed: c.student(e, s, tuned[e], slot) for entry, seed in left]
        if not c.pool("students", work, seconds):
            print(f"MINUTES={args.minutes:g} have passed; start it again to resume. So far:")
    for seed in args.seeds[1:]:
        c.untrained(seed)
    print("3/3 shared neighbours, table and plot")
    overlap(c)
    subprocess.run([PYTHON, ROOT / "scripts/compare_report.py", folder], check=True)


def overlap(c: Comparison) -> None:
    """Compute the students' overlap with the teacher on test images: adds those missing in overlap.json."""
    args, path = c.args, c.folder / "overlap.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    students = {entry: c.folder / entry / "run/student.pth" for entry in finished(c.folder)}
    students = {name: file for name, file in students.items() if name not in known}
    images = json.loads((c.folder / "teacher/knn.json").read_text(encoding="utf-8"))["test_images"]
    if students:
        found, work = c.folder / "overlap.part", c.folder / "overlap"
        c.python(c.folder / "overlap.log", "evaluate.py", "overlap", "--data", args.data, "--teacher", args.teacher,
                 "--weights", *students.values(), "--names", *students, "--k", OVERLAP_K, "--subset",
                 min(1.0, OVERLAP_IMAGES / images), "--picture", "none", "--output", work, "-j", args.workers, "--json",
                 result=found, all_cores=True)
        metrics = json.loads(found.read_text(encoding="utf-8"))["metrics"]
        path.write_text(json.dumps({**known, **metrics}, indent=1) + "\n", encoding="utf-8")
        found.unlink()
        shutil.rmtree(work)


def finished(folder: Path) -> list[str]:
    """Names METHOD-SEED of the students that have been trained and scored."""
    return sorted(path.parent.name for path in folder.glob("*/linear.json") if (path.parent / "run").is_dir())


def main() -> None:
    args = parse_args()
    try:
        with Children() as children:
            (search if args.search else compare)(args, children)
    except RunPaused:
        print("stopped; the same command again resumes", file=sys.stderr)
        raise


if __name__ == "__main__":
    run_script(main)
