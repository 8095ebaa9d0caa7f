#!/usr/bin/env python
"""The memory that a step was estimated to need before the first one, and what it really took, in main memory.

    python benchmarks/step_memory.py --output DIR STUDENT TEACHER ... [-- further flags of train_distill.py]

For each student and teacher (names of architectures, random weights) it runs an epoch of train_distill.py in a process
of its own, on the built-in images, and prints a row of a table; --subset leaves a few steps of it. Measured is the peak
of the process's memory above what it held when the estimate was made. CPU only, Linux.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from runtime.start import begin
    begin(reads_proc=True)

MB = 1 << 20


def one(student: str, teacher: str, folder: Path, flags: list[str]) -> None:
    """Print as JSON the bytes that are needed at least, those that were estimated and those that were measured."""
    import resource

    import torch

    from models.backbones import build_backbone
    from runtime import memory
    from runtime.run import Run

    folder.mkdir(parents=True, exist_ok=True)
    weights, found = folder / f"{teacher}.pth", {}
    trunk = build_backbone(teacher)
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in trunk.state_dict().items()}, **trunk.spec.record()},
               weights)
    del trunk

    def check(needed: dict[str, float], device: torch.device, *_: object) -> str:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        least = sum(needed.values())
        found.update(least=least, estimated=memory.likely(least, device), before=pages * resource.getpagesize())
        return ""

    def before_saving(run: Run, *given: object, save: Callable[..., None] = Run.save) -> None:
        found.setdefault("peak", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        save(run, *given)

    Run.save = before_saving
    memory.check_memory = check  # before the script imports them
    sys.argv = ["train_distill.py", "--data", "demo", "--distill", str(weights), "-a", student,
                "--sampler", "random", "--output", str(folder / f"{student}-{teacher}"), "--epochs", "1", "-j", "0",
                "--device", "cpu", *flags]
    runpy.run_path(str(ROOT / "train_distill.py"), run_name="__main__")
    print(json.dumps([found["least"], found["estimated"], found["peak"] - found["before"]]))


def main() -> None:
    """Run each pair, print the table."""
    words, _, flags = (" ".join(sys.argv[1:])).partition(" -- ")
    _, folder, *names = words.split()
    if names[:1] == ["--one"]:
        one(*names[1:], Path(folder), flags.split())
        return
    print("| student | teacher | at least MB | estimated MB | measured MB | ratio |\n|---|---|---|---|---|---|")
    for student, teacher in zip(names[::2], names[1::2], strict=True):
        command = [sys.executable, __file__, "--output", folder, "--one", student, teacher, "--", *flags.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        least, estimated, measured = json.loads(done.stdout.splitlines()[-1])
        print(f"| {student} | {teacher} | {least / MB:,.0f} | {estimated / MB:,.0f} | {measured / MB:,.0f} | "
              f"{estimated / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
