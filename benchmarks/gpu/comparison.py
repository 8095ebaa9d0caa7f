"""Part (f): methods at an equal budget, by scripts/compare_methods.sh, as many as fit; the rest in a second go.

CIFAR-10 where --data has it, else the built-in images. What a second go needs (scores, logs, the teacher if one was
trained) comes back as methods.tar.gz; students do not.
"""

from __future__ import annotations

import json
import shlex
import shutil
import tarfile

from job import Command, Found, Job, Part
from made import tree

CIFAR = {"PASSES": "460800", "EPOCHS": "10", "JOBS": "4", "WORKERS": "2"}  # nine looks at each image
BUILT_IN = {"JOBS": "4", "WORKERS": "2"}
TINY = {"STEM": "imagenet", "PASSES": "96", "EPOCHS": "1", "BATCH": "16", "NEAREST_K": "1", "TOTAL_K": "3",
        "QUEUE": "32", "EVERY": "0", "SUBSET": "1", "JOBS": "1", "WORKERS": "0", "METHODS": "coss"}
TEACHER = ("--arch", "regnet_y_400mf", "--stem", "cifar", "--image-size", 32, "--head-bn", "-b", 256, "--lr", 0.06,
           "--moco-k", 4096, "--moco-m", 0.99, "--moco-t", 0.1, "--warmup-epochs", 0, "-p", 50, "--cache", "device",
           "--epochs", 15)
TRAIN_AND_KEEP = '"$PYTHON" train_teacher.py --output "$0" "${@:2}" && cp "$0/teacher.pth" "$1"'
KEPT = ("*/knn.json", "*/linear.json", "*.json", "report.*", "*/run/config.json", "*/run/metrics.jsonl",
        "*/run/not-finite", "teacher.pth")
RESERVE = 40.0   # seconds for the table after the last student
TRAINING = 240.0  # that there must be where the teacher is to be trained first


def commands(job: Job, seconds: float) -> list[Command]:
    folder, saved = job.work / "methods", job.output / "methods.tar.gz"
    if saved.exists():
        with tarfile.open(saved) as archive:
            archive.extractall(folder, filter="data")
    folder.mkdir(exist_ok=True)
    cifar = job.data / "cifar10" if job.data and (job.data / "cifar10").is_dir() else None
    teacher, training, settings = "assets/demo_teacher.pth", [], {"DATA": "demo", **BUILT_IN}
    if cifar:
        settings = {"DATA": str(cifar), **CIFAR}
        teacher = cifar / "teacher.pth" if (cifar / "teacher.pth").exists() else folder / "teacher.pth"
        if not teacher.exists():
            if seconds < TRAINING:
                said = f"the teacher's training takes more than the {seconds:.0f} s that are left; give --only methods"
                return [Command("teacher", ("bash", "-c", f"echo {shlex.quote(said)}; exit 1"), 5, shell=True)]
            words = ("bash", "-c", TRAIN_AND_KEEP, job.work / "teacher", teacher, "--data", cifar, *TEACHER)
            training = [Command("teacher", words, seconds / 2, shell=True)]
    if job.rehearse:
        tree(job.work / "tiny", 12, 6)
        settings = {"DATA": str(job.work / "tiny"), **TINY}
    students = seconds - RESERVE - (seconds / 2 if training else 0)
    compare = Command("compare_methods.sh", ("bash", "scripts/compare_methods.sh"), seconds, {  # most telling first
        **settings, "TEACHER": str(teacher), "OUT": str(folder), "SEEDS": "0",
        "MINUTES": job.size(f"{max(0.1, students / 60):.2f}", "0")}, shell=True)
    return [*training, compare]


def harvest(job: Job) -> Found:
    report = job.work / "methods/report.md"
    rows = report.read_text().splitlines() if report.exists() else []
    names = [line.split("|")[1].strip() for line in rows if line.startswith("| ") and "*" not in line][1:]
    return Found(f"{len(names)} methods: {', '.join(names) or 'none yet'}", rows, {"methods": names},
                 "" if names else "no student was trained and scored")


def close(job: Job) -> None:
    """Keep what a second go needs; of each student its scores, and itself where the teacher was not yet beside it."""
    folder, part = job.work / "methods", job.output / "methods.tar.gz.part"
    if job.rehearse or not folder.is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        return
    overlap = folder / "overlap.json"
    compared = json.loads(overlap.read_text()) if overlap.exists() else {}
    students = {path for path in folder.glob("*/run/student.pth") if path.parents[1].name not in compared
                and (path.parents[1] / "linear.json").exists()}
    kept = students | {path for pattern in KEPT for path in folder.glob(pattern) if path.is_file()}
    with tarfile.open(part, "w:gz") as archive:
        for path in sorted(kept):
            archive.add(path, path.relative_to(folder))
    part.replace(job.output / "methods.tar.gz")


METHODS = Part("methods", "Methods at an equal budget", 110, 540, commands, harvest, close)
