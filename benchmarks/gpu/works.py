"""Part (a): does it work? Runs `pytest -m gpu` on as many processes as the cores allow."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter

from job import Command, Found, Job, Part

BRIEF = "neighbours or squeezenet1_1 and off or first_steps and rkd or no_loss and seed and bf16"  # for a rehearsal


def commands(job: Job, seconds: float) -> list[Command]:
    several = importlib.util.find_spec("xdist") is not None and not job.rehearse
    slow_first = [f"tests/gpu/test_{name}.py" for name in ("scripts", "parity", "no_waiting")]
    words = ["-m", "pytest", *slow_first, "-m", "gpu", "-o", "addopts=--strict-markers", "-p", "no:cacheprovider",
             "--tb", "short", "--basetemp", job.work / "tests", "-n" if several else "-v",
             *([min(8, max(1, job.cores // 2))] if several else []), *job.size([], ["-k", BRIEF])]
    return [Command("pytest -m gpu", tuple(words), seconds,
                    {"COSS_TEST_DEVICE": job.device, "COSS_TEST_REPORT": str(job.work / "tests.jsonl")})]


def harvest(job: Job) -> Found:
    lines = [json.loads(line) for line in (job.work / "tests.jsonl").read_text().splitlines()]
    counts = Counter(line["outcome"] for line in lines)
    failed = [line for line in lines if line["outcome"] == "failed"]
    rows = [f"- {line['test']}: {line['said']}" for line in failed]
    figure = f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
    return Found(figure, rows, {"tests": lines}, "" if counts["passed"] and not failed else figure)


WORKS = Part("works", "Does it work: every script and loss; results against the CPU's", 45, 120, commands, harvest)
