"""The folder of scripts/compare_methods.sh and the commands that fill it; finished results are not repeated."""

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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from compare_plan import Budget, Tuned, plan_of
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
PYTHON = os.environ["PYTHON"] if os.environ.get("NO_VENV") else sys.executable  # as scripts/_env.sh takes it
LINEAR_IMAGES = 10_000  # at most as many train the linear classifier, which would take longer than a student
ENDED = "not-finite"  # a file in the folder of such a training
sys.path.insert(0, str(ROOT))

from checkpoints.by_name import sha256_of  # noqa: E402
from losses import needs_of  # noqa: E402
from runtime.errors import EXIT_PAUSED, RunPaused, UserError  # noqa: E402
from runtime.signals import StopSignals  # noqa: E402


class Children(StopSignals):
    """The commands that run. Within this context a stop signal goes on to them as SIGTERM, at which a training writes
    its checkpoint; no other starts, and :class:`RunPaused` is raised once they have ended."""

    def __init__(self) -> None:
        super().__init__()
        self.running: dict[object, subprocess.Popen[str] | None] = {}

    def run(self, command: Sequence[str], **options: Any) -> tuple[int, str]:
        """The exit code of ``command`` and, with ``stdout=PIPE``, what it printed; in any thread."""
        if self.asked:
            raise RunPaused
        key = object()
        self.running[key] = None
        try:
            with subprocess.Popen(command, text=True, **options) as process:
                self.running[key] = process
                if self.asked:
                    process.terminate()
                said, _ = process.communicate()
        finally:
            del self.running[key]
        if process.returncode == EXIT_PAUSED or (process.returncode and self.asked):
            raise RunPaused
        return process.returncode, said

    def _note(self, number: int, frame: FrameType | None) -> None:
        super()._note(number, frame)
        for process in filter(None, list(self.running.values())):
            process.terminate()
        if not self.running:
            raise RunPaused


class Comparison:
    """A folder of students, and the commands that fill it."""

    def __init__(self, args: argparse.Namespace, folder: Path, budget: Budget, children: Children) -> None:
        self.args, self.folder, self.budget, self.children = args, folder, budget, children
        self.plans = {entry: plan_of(entry, budget) for entry in args.methods}
        gpus = _gpus()
        self.jobs = args.jobs or max(1, (gpus or os.cpu_count() or 1) // args.gpus)
        self.slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(self.jobs):
            self.slots.put(slot)
        self.environment = dict(os.environ)
        if not gpus:
            threads = max(1, (os.cpu_count() or 1) // (self.jobs * args.gpus))
            self.environment.setdefault("OMP_NUM_THREADS", str(threads))
        self.gpus = gpus if args.gpus == 1 and self.jobs > 1 else 0  # to be dealt out

    def same_settings(self) -> None:
        """Refuse a folder that was made with other settings; seeds and methods may be added."""
        args, path = self.args, self.folder / "settings.json"
        settings = {"data": args.data, "subset": args.subset, "teacher": _sha256(args.teacher),
                    "student": args.student, "stem": args.stem, "amp": args.amp, "queue": args.queue,
                    **vars(self.budget)}
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [f"{key} was {before.get(key)}, now {value}" for key, value in settings.items()
                       if before.get(key) != value]
            if changed:
                raise UserError(f"{self.folder} was made with other settings ({'; '.join(changed)}); set OUT to "
                                "another folder or remove it")
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    def python(self, log: Path, *words: object, result: Path | None = None, slot: int | None = None,
               processes: int = 1, all_cores: bool = False) -> None:
        """Run a script; what it says goes to ``log`` and, once it is done, its standard output to ``result``."""
        log.parent.mkdir(parents=True, exist_ok=True)
        script, torchrun = words[0], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        words = (*torchrun, *words) if processes > 1 else words
        environment = dict(self.environment)
        if all_cores:
            environment.pop("OMP_NUM_THREADS", None)
        if slot is not None and self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(slot % self.gpus)
        with log.open("a", encoding="utf-8") as said:
            code, printed = self.children.run([PYTHON, *map(str, words)], cwd=ROOT, env=environment,
                                              stdout=subprocess.PIPE if result else said, stderr=said)
        if code:
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1:] or [f"exit code {code}"]
            raise UserError(f"{script} failed: {last[0][:300]} (full output in {log})")
        if result:
            part = result.with_suffix(".part")
            part.write_text(printed, encoding="utf-8")
            part.replace(result)

    def mine(self, data: str) -> None:
        """The teacher's neighbours, and the size of its images."""
        if not (self.folder / "neighbours/closek_info.json").exists():
            self.python(self.folder / "mine.log", "compute_knn.py", "mine", "--data", data,
                        "--subset", self.args.subset, "--weights", self.args.teacher,
                        "--output", self.folder / "neighbours", "--k", max(32, self.budget.total_k),
                        "-j", self.args.workers)

    def train(self, folder: Path, entry: str, seed: int, tuned: Tuned, data: str, slot: int | None = None,
              epochs: int | None = None, steps: int | None = None, every: int | None = None) -> None:
        """One student, ``folder``/student.pth; an interrupted one resumes. Numbers that are not finite are a result
        as well, see :func:`ended`."""
        args, plan, near = self.args, self.plans[entry], []
        if plan.sampler == "cf":
            near = ["--closek-info", self.folder / "neighbours/closek_info.npy", "--nearest-k", plan.nearest_k,
                    "--total-k", plan.total_k]
        steps = steps or plan.epoch_steps
        command = (
            "train_distill.py", "--data", data, "--subset", args.subset, "--output", folder,
            "--seed", seed, "-a", args.student, "--stem", args.stem, "--distill", args.teacher, "--loss", plan.loss,
            "--image-size", self.image_size(), "--sampler", plan.sampler, "-b", plan.anchors, *near, "--lr",
            tuned.rate, "--epochs", epochs or self.budget.epochs, "--epoch-steps", steps, "--warmup-epochs",
            tuned.warmup, "-p", steps,
            "--amp", args.amp, "--queue-size", args.queue, "--moco-m", 0.99, "--bn-parts", 4, *plan.flags,
            *(["--head-bn"] if plan.head_bn else []), "--cache", "device", "--knn-every", every or args.every,
            "-j", args.workers)
        try:
            self.python(folder / "all.log", *command, slot=slot, processes=args.gpus)
        except UserError as error:
            if "not finite" not in str(error):
                raise
            (folder / ENDED).touch()

    def image_size(self) -> int:
        """The side of the images that the teacher sees."""
        return json.loads((self.folder / "neighbours/closek_info.json").read_text(encoding="utf-8"))["image_size"]

    def score(self, folder: Path, *network: object, slot: int | None = None) -> None:
        """``folder``/knn.json, ``folder``/linear.json and, with SHIFTED, ``folder``/shifted.json of a network."""
        args, log, features = self.args, folder / "scores.log", folder / "evaluation"
        knn, linear, shifted = (folder / f"{name}.json" for name in ("knn", "linear", "shifted"))
        common = (*network, "-j", args.workers, "--json")
        if not knn.exists():
            self.python(log, "compute_knn.py", "eval", "--data", args.data, "--subset", args.subset, *common,
                        result=knn, slot=slot)
        images = json.loads(knn.read_text(encoding="utf-8"))["train_images"]
        common = ("--subset", args.subset * min(1, LINEAR_IMAGES / images), *common, "--output", features)
        if args.shifted and not shifted.exists():  # its classifier is that of linear --cached
            self.python(log, "evaluate.py", "robustness", "--train", args.data, "--ood", f"shifted={args.shifted}",
                        *common, result=shifted, slot=slot)
            top1 = json.loads(shifted.read_text(encoding="utf-8"))["metrics"]["sets"]["test"]["top1"]
            linear.write_text(json.dumps({"metrics": {"top1": top1}}), encoding="utf-8")
        if not linear.exists():
            self.python(log, "evaluate.py", "linear", "--cached", "--data", args.data, *common, result=linear,
                        slot=slot)
        shutil.rmtree(features, ignore_errors=True)  # those of all students would fill a disk

    def scored(self, folder: Path) -> bool:
        """Whether a network has all scores."""
        return (folder / ("shifted.json" if self.args.shifted else "linear.json")).exists()

    def untrained(self, seed: int) -> None:
        """The scores of an untrained student."""
        args = self.args
        self.score(self.folder / f"untrained-{seed}", "--weights", "untrained", "--arch", args.student, "--stem",
                   args.stem, "--image-size", self.image_size(), "--seed", seed)

    def student(self, entry: str, seed: int, tuned: Tuned, slot: int) -> None:
        """Train and score one."""
        folder = self.folder / f"{entry}-{seed}"
        self.train(folder / "run", entry, seed, tuned, self.args.data, slot)
        if not ended(folder / "run"):
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
        """Image passes per second of each of JOBS students trained side by side, measured over a few steps."""
        path = self.folder / "speed.json"
        if not path.exists():
            steps = max(4, -(-256 // self.budget.batch))
            folders = [self.folder / f"speed/{slot}" for slot in range(self.jobs)]
            self.pool("speed", [lambda slot, f=folder: self.train(f, entry, 0, Tuned(1e-4, 1), data, slot, 2, steps, 2)
                                for folder in folders], 0)
            lines = [read_metrics(folder, "train")[-1] for folder in folders]
            found = min(line["images_per_second"] for line in lines) * needs_of(self.plans[entry].loss).passes
            path.write_text(json.dumps({"passes_per_second": found, "jobs": self.jobs}) + "\n", encoding="utf-8")
            shutil.rmtree(self.folder / "speed")
        return json.loads(path.read_text(encoding="utf-8"))["passes_per_second"]


def ended(run: Path) -> bool:
    """Whether a student's training stopped because its loss was not finite."""
    return (run / ENDED).exists()


def read_metrics(run: Path, group: str) -> list[dict[str, float]]:
    """A run's lines of metrics.jsonl of one group."""
    with contextlib.suppress(FileNotFoundError):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if line["group"] == group]
    return []


def _gpus() -> int:
    return torch.cuda.device_count()


def _sha256(teacher: str) -> str:
    if digest := sha256_of(teacher, "TEACHER"):
        return digest
    raise UserError(f"TEACHER={teacher} is not a file; give the checkpoint of a network trained on DATA")
