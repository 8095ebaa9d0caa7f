#!/usr/bin/env python
"""What scripts/compare_methods.sh runs: its header says what is compared and how. Plans, trains, scores, goes on."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from losses import needs_of  # noqa: E402
from runtime.errors import UserError, run_script  # noqa: E402

SEARCH_SEED = 1000  # none of the table's
HELD_OUT = 0.2      # of each class's training images, for the search
OVERLAP_IMAGES = 2000


def parse_args() -> argparse.Namespace:
    """Everything has its value from scripts/compare_methods.sh."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    for name in ("data", "teacher", "output", "student", "stem", "rates"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("passes", "epochs", "batch", "nearest-k", "total-k", "queue", "every", "search-passes", "gpus", "jobs",
                 "workers"):
        parser.add_argument(f"--{name}", required=True, type=int)
    for name in ("subset", "minutes"):
        parser.add_argument(f"--{name}", required=True, type=float)
    parser.add_argument("--methods", required=True, nargs="+")
    parser.add_argument("--seeds", required=True, nargs="+", type=int)
    parser.add_argument("--candidates", required=True, nargs="+", type=float)
    parser.add_argument("--search", action="store_true")
    return parser.parse_args()


# ---- the plan


@dataclass(frozen=True)
class Budget:
    """What all students have in common."""

    passes: int
    epochs: int
    batch: int
    nearest_k: int
    total_k: int

    def rounded(self) -> Budget:
        """The passes that give every method (1, 1.5 or 2 a batch's image) whole steps in every epoch."""
        unit = 6 * self.epochs * self.batch
        return Budget(max(1, self.passes // unit) * unit, self.epochs, self.batch, self.nearest_k, self.total_k)


@dataclass(frozen=True)
class Plan:
    """How one method spends the budget."""

    loss: str
    sampler: str
    anchors: int      # -b
    nearest_k: int
    total_k: int
    epoch_steps: int
    momentum: bool


def plan_of(entry: str, budget: Budget) -> Plan:
    """``entry``: a loss or a sum of losses, and behind an @ the sampler (random or cf) if not the method's own."""
    loss, _, sampler = entry.partition("@")
    needs = needs_of(loss)
    if sampler not in ("", "random", "cf"):
        raise UserError(f"METHODS names {entry}; behind the @ may stand random or cf")
    sampler = "cf" if needs.bag else sampler or ("cf" if "coss" in loss.split("+") else "random")
    near, of = (0, 0) if sampler == "random" else (1, 5) if needs.bag else (budget.nearest_k, budget.total_k)
    if budget.batch % (1 + near):
        raise UserError(f"BATCH={budget.batch} is not whole anchors with {near} neighbours each; give a multiple of "
                        f"{1 + near}")
    steps = budget.passes / (budget.batch * needs.passes * budget.epochs)
    if not steps.is_integer():
        raise UserError(f"{entry} takes {needs.passes:g} passes an image, which does not divide PASSES={budget.passes}")
    return Plan(loss, sampler, budget.batch // (1 + near), near, of, int(steps), needs.momentum)


def read_rates(entries: Iterable[str], files: Sequence[Path]) -> dict[str, float]:
    """The learning rate of each entry: its own line, or that of its loss, of the first file that has one."""
    found: dict[str, float] = {}
    for path in reversed([path for path in files if path.is_file()]):
        lines = [line.split() for line in path.read_text().splitlines() if line and not line.startswith("#")]
        rates = {words[0]: float(words[1]) for words in lines}
        found |= {entry: rates.get(entry, rates.get(entry.partition("@")[0])) for entry in entries
                  if entry in rates or entry.partition("@")[0] in rates}
    missing = [entry for entry in entries if entry not in found]
    if missing:
        raise UserError(f"there is no learning rate for {', '.join(missing)} in {' or '.join(map(str, files))}; find one "
                        "with bash scripts/compare_methods.sh --search, or write a line NAME RATE there")
    return found


# ---- running it


class Comparison:
    """A folder of students, and the commands that fill it."""

    def __init__(self, args: argparse.Namespace, folder: Path, budget: Budget) -> None:
        self.args, self.folder, self.budget = args, folder, budget
        self.plans = {entry: plan_of(entry, budget) for entry in args.methods}
        cards = _cards()
        self.jobs = args.jobs or max(1, (cards or os.cpu_count() or 1) // args.gpus)
        self.slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(self.jobs):
            self.slots.put(slot)
        self.environment = dict(os.environ)
        if not cards:
            threads = max(1, (os.cpu_count() or 1) // (self.jobs * args.gpus))
            self.environment.setdefault("OMP_NUM_THREADS", str(threads))
        self.cards = cards if args.gpus == 1 and self.jobs > 1 else 0  # to be dealt out

    def same_settings(self) -> None:
        """Refuse a folder that was made with other settings; seeds and methods may be added."""
        args, path = self.args, self.folder / "settings.json"
        settings = {"data": args.data, "subset": args.subset, "teacher": _sha256(Path(args.teacher)),
                    "student": args.student, "stem": args.stem, "queue": args.queue, **vars(self.budget)}
        if path.exists():
            before = json.loads(path.read_text())
            changed = [f"{key} was {before.get(key)}, now {value}" for key, value in settings.items()
                       if before.get(key) != value]
            if changed:
                raise UserError(f"{self.folder} was made with other settings ({'; '.join(changed)}); set OUT to another "
                                "folder or remove it")
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1) + "\n")

    def python(self, log: Path, *words: object, result: Path | None = None, slot: int | None = None,
               processes: int = 1) -> None:
        """Run a script; what it says goes to ``log`` and, once it is done, its standard output to ``result``."""
        log.parent.mkdir(parents=True, exist_ok=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] if processes > 1 else []
        environment = dict(self.environment)
        if slot is not None and self.cards:
            environment["CUDA_VISIBLE_DEVICES"] = str(slot % self.cards)
        with log.open("a") as said:
            done = subprocess.run([sys.executable, *map(str, [*launcher, *words])], cwd=ROOT, env=environment, text=True,
                                  stdout=subprocess.PIPE if result else said, stderr=said, check=False)
        if done.returncode:
            last = log.read_text().strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise UserError(f"{' '.join(map(str, words[:2]))} failed: {last[0][:300]} (all of it in {log})")
        if result:
            part = result.with_suffix(".part")
            part.write_text(done.stdout)
            part.replace(result)

    def mine(self, data: str) -> None:
        """The teacher's neighbours, and the size of its images."""
        if not (self.folder / "neighbours/closek_info.json").exists():
            self.python(self.folder / "mine.log", "compute_knn.py", "mine", "--data", data, "--subset", self.args.subset,
                        "--weights", self.args.teacher, "--output", self.folder / "neighbours", "--k", 32,
                        "-j", self.args.workers)

    def train(self, folder: Path, entry: str, seed: int, rate: float, data: str, slot: int | None = None,
              epochs: int | None = None, steps: int | None = None, every: int | None = None) -> None:
        """One student, ``folder``/student.pth; one that was cut short goes on."""
        args, plan, near = self.args, self.plans[entry], []
        if plan.sampler == "cf":
            near = ["--closek-info", self.folder / "neighbours/closek_info.npy", "--nearest-k", plan.nearest_k,
                    "--total-k", plan.total_k]
        steps = steps or plan.epoch_steps
        self.python(
            folder / "all.log", "train_distill.py", "--data", data, "--subset", args.subset, "--output", folder,
            "--seed", seed, "-a", args.student, "--stem", args.stem, "--distill", args.teacher, "--loss", plan.loss,
            "--image-size", self.image_size(), "--sampler", plan.sampler, "-b", plan.anchors, *near, "--lr", rate,
            "--epochs", epochs or self.budget.epochs, "--epoch-steps", steps, "--warmup-epochs", 1, "-p", steps,
            "--queue-size", args.queue, "--moco-m", 0.99, "--bn-parts", 4, "--alone-epochs", 1,
            *(["--head-bn"] if plan.momentum else []), "--cache", "device", "--knn-every", every or args.every,
            "-j", args.workers, slot=slot, processes=args.gpus)

    def image_size(self) -> int:
        """The side of the images that the teacher sees."""
        return json.loads((self.folder / "neighbours/closek_info.json").read_text())["image_size"]

    def score(self, folder: Path, *network: object, slot: int | None = None) -> None:
        """``folder``/knn.json and ``folder``/linear.json of a network."""
        common = ("--data", self.args.data, "--subset", self.args.subset, *network, "-j", self.args.workers, "--json")
        if not (folder / "knn.json").exists():
            self.python(folder / "scores.log", "compute_knn.py", "eval", *common, result=folder / "knn.json", slot=slot)
        if not (folder / "linear.json").exists():
            features = folder / "evaluation"  # of all students they would fill a disk
            self.python(folder / "scores.log", "evaluate.py", "linear", "--cached", *common, "--output", features,
                        result=folder / "linear.json", slot=slot)
            shutil.rmtree(features, ignore_errors=True)

    def untrained(self, seed: int) -> None:
        """What a student has before it learns."""
        args = self.args
        self.score(self.folder / f"untrained-{seed}", "--weights", "untrained", "--arch", args.student, "--stem",
                   args.stem, "--image-size", self.image_size(), "--seed", seed)

    def student(self, entry: str, seed: int, rate: float, slot: int) -> None:
        """Train and score one."""
        folder = self.folder / f"{entry}-{seed}"
        self.train(folder / "run", entry, seed, rate, self.args.data, slot)
        self.score(folder, "--weights", folder / "run/student.pth", slot=slot)

    def pool(self, label: str, work: Sequence[Callable[[int], None]], seconds: float) -> bool:
        """All of ``work`` on all slots; False if MINUTES left some undone. The first failure ends it."""
        started, skipped, failures = time.monotonic(), [], []

        def run(task: Callable[[int], None]) -> None:
            late = self.args.minutes and time.monotonic() - started + seconds > 60 * self.args.minutes
            if late or failures:
                skipped.append(task)
                return
            slot = self.slots.get()
            try:
                task(slot)
            except UserError as error:
                failures.append(error)
            finally:
                self.slots.put(slot)

        with ThreadPoolExecutor(self.jobs) as threads:
            for _ in tqdm(threads.map(run, work), total=len(work), desc=label, smoothing=0):
                pass
        if failures:
            raise failures[0]
        return not skipped

    def measure(self, entry: str, data: str) -> float:
        """Image passes a second of each of JOBS students side by side, from a few steps."""
        path = self.folder / "speed.json"
        if not path.exists():
            steps = max(4, -(-256 // self.budget.batch))
            folders = [self.folder / f"speed/{slot}" for slot in range(self.jobs)]
            self.pool("speed", [lambda slot, f=folder: self.train(f, entry, 0, 1e-4, data, slot, 2, steps, 2)
                                for folder in folders], 0)
            lines = [read_metrics(folder, "train")[-1] for folder in folders]
            found = min(line["images_per_second"] for line in lines) * needs_of(self.plans[entry].loss).passes
            path.write_text(json.dumps({"passes_per_second": found, "jobs": self.jobs}) + "\n")
            shutil.rmtree(self.folder / "speed")
        return json.loads(path.read_text())["passes_per_second"]


def read_metrics(run: Path, group: str) -> list[dict[str, float]]:
    """A run's lines of metrics.jsonl of one group."""
    with contextlib.suppress(FileNotFoundError):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["group"] == group]
    return []


def compare(args: argparse.Namespace) -> None:
    """Everything, then the table."""
    folder, budget = Path(args.output), Budget(args.passes, args.epochs, args.batch, args.nearest_k, args.total_k).rounded()
    c = Comparison(args, folder, budget)
    rates = read_rates(args.methods, [folder / "rates.txt", Path(args.rates)])
    c.same_settings()
    print("1/3 the teacher's neighbours and scores, and an untrained student's")
    c.mine(args.data)
    c.score(folder / "teacher", "--weights", args.teacher)
    began, fresh = time.monotonic(), not (folder / f"untrained-{args.seeds[0]}/linear.json").exists()
    c.untrained(args.seeds[0])
    scoring = time.monotonic() - began if fresh else 0.0
    left = [(entry, seed) for seed in args.seeds for entry in args.methods
            if not (folder / f"{entry}-{seed}/linear.json").exists()]
    seconds = 0.0
    if left:
        speed = c.measure(args.methods[0], args.data)
        path = folder / "scoring.json"
        if fresh:
            path.write_text(json.dumps(scoring))
        seconds = budget.passes / speed + 2 * json.loads(path.read_text())  # once in training too
        print(f"2/3 {len(left)} students of {budget.passes:,} image passes, {c.jobs} side by side; at {speed:.0f} passes a "
              f"second each, as measured, and with the scores about {len(left) / c.jobs * seconds / 60:.0f} minutes")
        work = [lambda slot, e=entry, s=seed: c.student(e, s, rates[e], slot) for entry, seed in left]
        if not c.pool("students", work, seconds):
            print(f"MINUTES={args.minutes:g} are over; start it again to go on. So far:")
    for seed in args.seeds[1:]:
        c.untrained(seed)
    print("3/3 shared neighbours, table and plot")
    overlap(c)
    subprocess.run([sys.executable, ROOT / "scripts/compare_report.py", folder], check=True)


def overlap(c: Comparison) -> None:
    """Neighbours that each student shares with the teacher, on test images: overlap.json, for all of them at once."""
    raise NotImplementedError


def search(args: argparse.Namespace) -> None:
    """A learning rate for each method, by 10-NN on training images that were held out: rates.txt in the output."""
    raise NotImplementedError


def _cards() -> int:
    import torch

    return torch.cuda.device_count()


def _sha256(path: Path) -> str:
    import hashlib

    if not path.is_file():
        raise UserError(f"TEACHER={path} is no file; give the checkpoint of a network trained on DATA")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    args = parse_args()
    (search if args.search else compare)(args)


if __name__ == "__main__":
    run_script(main)
