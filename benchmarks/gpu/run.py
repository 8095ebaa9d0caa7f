#!/usr/bin/env python
"""The program behind benchmarks/gpu.sh, whose header explains it: runs the parts and writes results after each."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from runtime.start import begin
    begin(reads_proc=True)

from comparison import METHODS
from job import Found, Job, Part, run
from measured import COLOUR, FEED, SEARCH, STEP
from works import WORKS

from runtime.errors import UserError, run_script

PARTS = {part.name: part for part in (WORKS, STEP, SEARCH, COLOUR, FEED, METHODS)}  # the most important first
TINY_LEAST = 15.0    # seconds that must be left to start a part of a rehearsal
RESERVE = 8.0        # seconds reserved for writing results at the end
LOG_BYTES = 200_000  # bytes of a command's output to keep

MACHINE = """
import json, os, platform, torch, torchvision
found = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
         "cores": len(os.sched_getaffinity(0)), "gpu": None}
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    found |= {"gpu": gpu.name, "gpu_gib": round(gpu.total_memory / 2**30, 1), "cuda": torch.version.cuda,
              "cudnn": torch.backends.cudnn.version(), "gpus": torch.cuda.device_count()}
print(json.dumps(found))
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu.sh", description="All parts on one GPU; the script's header says more.")
    parser.add_argument("--minutes", type=float, help="hard limit of the whole; default 9, of a rehearsal 3")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="four small files; default runs/gpu")
    parser.add_argument("--data", type=Path, help="folder with cifar10/{train,test}/CLASS/ (and, if there is one, "
                        "cifar10/teacher.pth) and photos/ (JPEG); what is not there is made up or left out")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}, with commas")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda; cpu for a rehearsal")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, the same path; figures that mean nothing")
    args = parser.parse_args()
    unknown = sorted({*args.only.split(",")} - {*PARTS})
    if unknown:
        raise UserError(f"--only names {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    if args.data and not args.data.is_dir():
        raise UserError(f"--data {args.data} is not a folder; give one that holds cifar10/ or photos/, or leave it out")
    if args.device == "cpu" and not args.rehearse:
        raise UserError("--device cpu is for rehearsals, since a CPU would take hours; add --rehearse")
    return args


def machine(device: str) -> dict[str, object]:
    """GPU, versions and cores, asked for by another process: this one leaves the GPU alone."""
    done = subprocess.run([sys.executable, "-c", MACHINE], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise UserError(f"{sys.executable} cannot be used ({said}); set PYTHON to one that has the packages of "
                        "requirements.txt")
    found = json.loads(done.stdout)
    if device == "cuda" and not found["gpu"]:
        raise UserError("PyTorch sees no GPU here; look at nvidia-smi and CUDA_VISIBLE_DEVICES, or rehearse with "
                        "--device cpu --rehearse")
    return found


def play(part: Part, job: Job, seconds: float) -> dict[str, object]:
    """Run a part's commands within ``seconds`` and read what they left."""
    began, steps = time.monotonic(), []
    until = began + seconds
    for number, command in enumerate(part.commands(job, seconds)):
        left = until - time.monotonic()
        log = job.work / f"{part.name}.{number}.log"
        if left < 1:
            steps.append({"command": command.label, "seconds": 0.0, "wrong": "not begun, its part's time was over"})
            continue
        wrong, spent = run(command, job, log, left if job.rehearse else min(command.limit, left))
        steps.append({"command": command.label, "seconds": round(spent, 1), "wrong": wrong})
        print(f"  {command.label}: {spent:.1f} s{f', {wrong}' if wrong else ''}", flush=True)
        keep_log(job, f"{part.name}: {command.label}", log)
    try:
        found = part.harvest(job)
    except Exception as error:  # a part that left half a file must not end the others
        found = Found("nothing that can be read", [], {}, f"{type(error).__name__}: {error}")
    part.close(job)
    wrongs = [found.wrong] * bool(found.wrong) + [f"{x['command']}: {x['wrong']}" for x in steps if x["wrong"]]
    return {"title": part.title, "state": "failed" if wrongs else "passed", "figure": found.figure, "wrong": wrongs,
            "seconds": round(time.monotonic() - began, 1), "commands": steps, "rows": found.rows,
            "values": found.values}


def keep_log(job: Job, title: str, log: Path) -> None:
    """The end of a command's output into the one log that comes back."""
    text = log.read_bytes()[-LOG_BYTES:] if log.exists() else b""
    with (job.output / "gpu.log").open("ab") as file:
        file.write(f"\n======== {title}\n".encode() + text)


def write(output: Path, report: dict) -> None:
    """gpu.json and gpu.md."""
    for name, text in (("gpu.json", json.dumps(report, indent=1) + "\n"), ("gpu.md", markdown(report))):
        part = output / f"{name}.part"
        part.write_text(text)
        part.replace(output / name)


def markdown(report: dict) -> str:
    """The rows of all parts, each with its machine and command."""
    lines = []
    for part in report["parts"].values():
        if part["state"] == "not begun":
            continue
        where = part["machine"]
        what = f"{where['gpu']}, {where['gpu_gib']} GiB, CUDA {where['cuda']}" if where["gpu"] else "no GPU"
        lines += [f"### {part['title']}", "", f"{what}; {where['cores']} cores, torch {where['torch']}, torchvision "
                  f"{where['torchvision']}; `{part['command']}`. {part['seconds']:.0f} s, {part['state']}: "
                  f"{part['figure']}.", "", *part["rows"], *[f"- {wrong}" for wrong in part["wrong"]], ""]
    return "\n".join(lines)


def table(report: dict) -> str:
    lines = [f"{'part':9s}{'':12s}{'s':>5s}  figure"]
    for name, part in report["parts"].items():
        lines.append(f"{name:9s}{part['state']:12s}{part['seconds']:5.0f}  {part['figure']}")
        lines += [f"{'':28s}{wrong[:200]}" for wrong in part["wrong"]]
    return "\n".join(lines)


def main() -> None:
    """Every part that still fits, in order."""
    began = time.monotonic()
    args = parse_args()
    minutes = args.minutes or (3.0 if args.rehearse else 9.0)
    until = began + 60 * minutes - RESERVE
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends too
    where = machine(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "gpu.json"
    report = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    work = Path(tempfile.mkdtemp(prefix="coss-gpu-"))
    job = Job(sys.executable, args.device, args.data and args.data.absolute(), work, args.output.absolute(),
              args.rehearse, len(os.sched_getaffinity(0)))
    command = f"bash benchmarks/gpu.sh {shlex.join(sys.argv[1:])}".strip()
    print(f"{where['gpu'] or 'no GPU'}, torch {where['torch']}, {where['cores']} cores; at most {minutes:g} minutes",
          flush=True)
    try:
        for name in [name for name in PARTS if name in args.only.split(",")]:
            part, left = PARTS[name], until - time.monotonic()
            least = job.size(part.least, TINY_LEAST)
            if left < least:
                report["parts"].setdefault(name, {"title": part.title, "state": "not begun", "seconds": 0.0, "rows": [],
                                                  "figure": f"it needs {least:.0f} s and {left:.0f} were left",
                                                  "wrong": [], "values": {}})
                continue
            print(f"{name}: {part.title}", flush=True)
            seconds = left if args.rehearse else min(part.most, left)
            report["parts"][name] = {**play(part, job, seconds), "machine": where, "command": command}
            write(args.output, report)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        report["parts"] = {name: report["parts"][name] for name in PARTS if name in report["parts"]}
        write(args.output, report)
        print(f"\n{table(report)}\n\n{args.output}/gpu.json, gpu.md, gpu.log", flush=True)
    if any(report["parts"][name]["state"] == "failed" for name in args.only.split(",") if name in report["parts"]):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
