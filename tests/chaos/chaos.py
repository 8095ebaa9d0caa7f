#!/usr/bin/env python
"""Train, kill the training at random moments, start it again, and compare its end with one that nothing disturbed.

    python tests/chaos/chaos.py --kills 20 --processes 1
    python tests/chaos/chaos.py --kills 20 --processes 2 --script train_teacher.py

A kill is SIGTERM, SIGINT or SIGUSR1 to the process (with several: SIGTERM to torchrun or to one rank), or SIGKILL to
all of it or, with several, to one rank. One kill in four falls at a moment of the start, the others at one of the
training and its saves. Prints what was done and one Markdown row, and ends with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.compare import differences  # noqa: E402

COMMON = ["--data", "demo", "--subset", "0.04", "--image-size", "32", "-b", "8", "--epochs", "6", "-p", "3",
          "--save-every", "5", "--keep", "3", "--workers", "1", "--device", "cpu"]
FLAGS = {
    "train_distill.py": [*COMMON, "--distill", str(ROOT / "assets" / "demo_teacher.pth"), "-a", "shufflenet_v2_x0_5",
                         "--stem", "cifar", "--sampler", "random", "--lr", "0.004", "--warmup-epochs", "1"],
    "train_teacher.py": [*COMMON, "--arch", "shufflenet_v2_x0_5", "--stem", "cifar", "--moco-k", "64", "--head-bn",
                         "--bn-parts", "2"],
}
KILLED = -signal.SIGKILL
PAUSED = 75


def start(script: str, flags: Sequence[str], output: Path, processes: int, log: Path) -> subprocess.Popen:
    """The real script in a session of its own, alone or under torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with log.open("a") as file:
        return subprocess.Popen([*launcher, str(ROOT / script), *flags, "--output", str(output)], stdout=file,
                                stderr=file, env=environment, start_new_session=True)


def children(pid: int) -> list[int]:
    """Processes whose parent is ``pid``, in the order of their birth."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid:
                found.append(int(path.name))
    return sorted(found)


def tree(pid: int) -> list[int]:
    """``pid`` and everything below it."""
    return [pid, *(x for child in children(pid) for x in tree(child))]


def send(number: signal.Signals, pids: Sequence[int]) -> None:
    """A signal to processes, some of which may be gone."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def kill(process: subprocess.Popen, draw: random.Random) -> str:
    """One kill of a kind that is drawn; returns its name."""
    ranks = [pid for pid in children(process.pid) if b"train_" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    under_torchrun = b"torch.distributed.run" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    kinds = ["TERM", "KILL"] + (["TERM one rank", "KILL one rank"] * bool(ranks) if under_torchrun else ["INT", "USR1"])
    kind = draw.choice(kinds)
    if kind == "KILL":
        send(signal.SIGKILL, tree(process.pid))
    elif "one rank" in kind:
        send(signal.Signals[f"SIG{kind.split()[0]}"], [draw.choice(ranks)])
    else:
        send(signal.Signals[f"SIG{kind}"], [process.pid])
    return kind


def disturbed(script: str, flags: Sequence[str], output: Path, processes: int, log: Path, kills: int, begin: float,
              training: float, draw: random.Random) -> tuple[Counter[str], int, float]:
    """Start again and again until the run is done; returns the kills by kind, the starts, and the seconds in all.

    Each of the first ``kills`` starts is killed within ``begin`` seconds of its start or ``training`` seconds of its
    first step; a start that is done sooner ends it.
    """
    done, began, starts = Counter(), time.monotonic(), 0
    while True:
        before = begun(log)
        process = start(script, flags, output, processes, log)
        starts += 1
        if done.total() < kills:
            limit = draw.uniform(0.5, begin) if draw.random() < 0.25 else None
            while limit is None and begun(log) == before and process.poll() is None:
                time.sleep(0.05)
            try:
                process.wait(draw.uniform(0, training) if limit is None else limit)
            except subprocess.TimeoutExpired:
                done[kill(process, draw)] += 1
        code = process.wait(900)
        if code == 0 and "\ndone: " in log.read_text():
            return done, starts, time.monotonic() - began
        if code == 2 or starts > 10 * kills + 10:
            raise SystemExit(f"it ended with {code}:\n{log.read_text()[-3000:]}")


def begun(log: Path) -> int:
    """How many starts have come to their first step."""
    return log.read_text().count("epochs of") if log.exists() else 0


def undisturbed(script: str, flags: Sequence[str], output: Path, processes: int, log: Path) -> tuple[float, float]:
    """Seconds until the first step, about, and of the whole run."""
    begin, began = 0.0, time.monotonic()
    process = start(script, flags, output, processes, log)
    while process.poll() is None:
        if not begin and begun(log):
            begin = time.monotonic() - began
        time.sleep(0.1)
    if process.returncode != 0:
        raise SystemExit(log.read_text()[-3000:])
    return begin, time.monotonic() - began


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", choices=FLAGS, default="train_distill.py", help="default train_distill.py")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="more than one: by torchrun; default 1")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="default 20")
    parser.add_argument("--seed", type=int, default=0, help="of the kinds and moments; default 0")
    return parser.parse_args()


def main() -> int:
    """The undisturbed run, the disturbed one, and what differs."""
    args = parse_args()
    work = Path(tempfile.mkdtemp(prefix="chaos-"))
    flags, log = FLAGS[args.script], work / "said.txt"
    begin, calm = undisturbed(args.script, flags, work / "calm", args.processes, log)
    training = 1.6 * (calm - begin) / max(1, args.kills)  # so that most of it is done when the last kill falls
    done, starts, seconds = disturbed(args.script, flags, work / "wild", args.processes, log, args.kills, begin,
                                      training, random.Random(args.seed))
    found = differences(work / "calm", work / "wild")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(done.items()))
    print(f"{args.script}, {args.processes} process(es): {calm:.0f} s undisturbed; {done.total()} kills ({kinds}), "
          f"{starts - 1} restarts, {seconds:.0f} s")
    print("| script | processes | undisturbed s | kills | restarts | s in all | s lost a kill | end state |")
    print(f"| {args.script} | {args.processes} | {calm:.0f} | {done.total()}: {kinds} | {starts - 1} | {seconds:.0f} | "
          f"{(seconds - calm) / max(1, done.total()):.1f} | {'identical' if not found else 'DIFFERS'} |")
    for line in found[:20]:
        print(line)
    if not found:
        shutil.rmtree(work)
    else:
        print(f"both are left in {work}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
