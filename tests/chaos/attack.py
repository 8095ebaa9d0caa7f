#!/usr/bin/env python
"""Give every flag of every script wrong values and wrong files, and count what becomes of it.

    python tests/chaos/attack.py                                    # all scripts, the slow sub-commands too
    python tests/chaos/attack.py --only "compute_knn.py mine" --flags k output --show silent traceback hung refused

Flags come from the scripts' own parsers. A numeric one gets 0, -1, nan, infinity, numbers beyond an int and a double,
text and nothing; one that takes words, paths or files gets each file of a small data set (packs, images, checkpoints,
tables, videos, tars), a folder, a FIFO, a device, files that cannot be read, names that are not UTF-8 or far too long.
Each case runs in a fork of one process that has the libraries loaded (as nobody, where that is root's), in its own
copy of the data, so that a crash, a hang and a replaced input show. Every case is one of:

    refused    exit code 2, 3 or 4 (75 for a run that a signal paused), one sentence that starts with error:, and
               nothing written but by runs that had begun (3)
    accepted   exit code 0, inputs as before, finite numbers in what was written, each number recorded as it was typed
    silent     exit code 0 without one of these, or refused after inputs were changed or files were left
    traceback  anything else that ends: a traceback, a signal, another exit code
    hung       not ended after --seconds; a run that is only long, whose log has a plan, must pause on SIGTERM instead

Prints one Markdown row a script and each case that is not refused or accepted; --log keeps every case with its output.
Ends with 1 if there is any of the last three. A random case that is accepted is not known to be right: read the log.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from attack_data import make_data  # noqa: E402

NOBODY = 65534  # whom a case runs as where this is root's, so that it can harm nothing but its copy
MEMORY = 6 << 30  # address space of a case beyond this process's, in bytes
PROCESSES = 100
KINDS = ("refused", "accepted", "silent", "traceback", "hung")
NUMBERS = ("0", "-1", "1", "nan", "inf", "-inf", "1e400", "1" + "0" * 400, "2147483647", "2147483648", "1e30", "1e-30",
           "0.5", "", "text", "1,2", "0x10", "１")
FILES = (  # of make_data
    "images", "images/train", "images/train/cat", "images/train/cat/00.jpg", "list.txt", "train.pack", "packs",
    "images.tar", "teacher.pth", "run", "run/student.pth", "run/checkpoint.pth", "run/config.json", "run/metrics.jsonl",
    "nn/closek_info.npy", "nn/closek_info.json", "nn/clusters_4.pth", "davis", "results.jsonl", "text", "empty",
    "empty_folder", "fifo", "socket", "loop", "dangling", "/dev/null", "/dev/zero", "/dev/full", "/dev/stdin",
    "unreadable", "unreadable_folder", "missing", "missing/missing", "images/train/cat/00.jpg/x", "nan.npy",
    "objects.npy", "huge.npy", "float.npy", "huge.jpg", "nan.pth", "/proc/self/mem",
    os.fsdecode(b"latin\xe9.pth"), os.fsdecode(b"missing\xff\xfe"))
WORDS = ("", " ", ".", "..", "~", "-", "text", "none", "auto", "0", "-1", "x" * 300, "x/" * 3000, "a\nb", "a\tb",
         "\x1b[31mred", "é", "%s{0}$(id)", "nan", "*")
TRAIN = ["--data", "images", "--image-size", "32", "-j", "0", "-b", "8", "--epochs", "1", "--device", "cpu", "--output",
         "out", "--stem", "cifar"]
STUDENT = ["-a", "shufflenet_v2_x0_5", "--epoch-steps", "2", "--lr", "0.01"]
NET = ["--weights", "run/student.pth", "--data", "images", "--device", "cpu", "-j", "0"]
SOME = ["--image-size", "32"]
CASES: dict[str, list[str]] = {  # script and sub-command -> a sound command line
    "train_distill.py": [*TRAIN, *STUDENT, "--distill", "teacher.pth", "--sampler", "random"],
    "train_teacher.py": [*TRAIN, "--arch", "shufflenet_v2_x0_5", "--moco-k", "16", "--lr", "0.01"],
    "compute_knn.py mine": [*NET, *SOME, "--output", "out", "--k", "4", "--features", "out/f"],
    "compute_knn.py cluster": [*NET, *SOME, "--output", "out", "--num-clusters", "3", "--features", "out/f"],
    "compute_knn.py check": ["nn/closek_info.npy", "--data", "images", "--sheet", "out/a.png", "--device", "cpu"],
    "compute_knn.py eval": [*NET, *SOME, "--features", "out/f", "--k", "3"],
    "embed.py": [*NET, *SOME, "--output", "out.npy", "--features", "out/f"],
    "pack_dataset.py": ["--data", "images", "--output", "out/train.pack", "-j", "0"],
    "export.py": ["--weights", "run/student.pth", "--to", "torchvision", "--output", "out.pth", "--images", "2"],
    "inspect_checkpoint.py": ["run/student.pth", "--data", "images", "--images", "20", "--device", "cpu", "-j", "0"],
    "evaluate.py knn": [*NET, "--output", "out", "--k", "3"],
    "evaluate.py linear": [*NET, "--output", "out", "--epochs", "1", "-b", "8"],
    "evaluate.py finetune": [*NET, "--output", "out", "--epochs", "1", "-b", "8", "--labels", "1"],
    "evaluate.py transfer": [*NET, "--output", "out", "--iterations", "5", "--jobs", "1"],
    "evaluate.py robustness": [*NET, "--output", "out", "--ood", "o=images", "--iterations", "5"],
    "evaluate.py retrieval": [*NET, "--output", "out", "--recall-at", "1"],
    "evaluate.py overlap": [*NET, "--output", "out", "--teacher", "teacher.pth", "--k", "3", "--image-size", "32"],
    "evaluate.py map": [*NET, *SOME, "--output", "out", "--teacher", "teacher.pth", "--images", "8"],
    "evaluate.py video": ["--weights", "run/student.pth", "--data", "davis", "--device", "cpu", "--output", "out",
                          "--short-side", "64"],
    "evaluate.py all": [*NET, "--output", "out", "--skip", "linear", "overlap"],
}
# What makes a flag count, put before it.
BESIDE = {
    "train_distill.py": {
        "nearest_k total_k coverage closek_info fark_info cluster_info":
            "--sampler cluster+cf --closek-info nn/closek_info.npy --cluster-info nn/clusters_4.pth --nearest-k 1 "
            "--total-k 3",
        "queue_size": "--loss seed --queue-size 16", "bingo_alone": "--loss bingo --queue-size 16",
        "disco_weight disco_sum": "--loss disco", "smd_tau smd_batch": "--loss smd", "rkd_weights": "--loss rkd",
        "moco_dim moco_m bn_parts": "--loss moco --queue-size 16", "loss_weights": "--loss coss+rkd",
        "knn_every knn_data": "--knn-every 1 --knn-data images", "nonfinite_limit": "--on-nonfinite skip"},
    "train_teacher.py": {"knn_every knn_data": "--knn-every 1 --knn-data images"},
    "pack_dataset.py": {"short_side": "--mode raw", "quality": "--mode jpeg"},
    "evaluate.py linear": {"solver decays rates iterations validation": "--cached --iterations 3"},
    "evaluate.py transfer": {"ways shots queries episodes few_shot_heads few_shot_from":
                             "--few-shot --skip-linear --ways 2 --shots 1 --queries 1 --episodes 3"},
}
ALONE = {"verify": [], "compare": [], "layouts": []}  # flags that stand without the others


class Case(NamedTuple):
    """One command line of one script, and the flag that it is about."""

    script: str
    flag: str
    value: str
    argv: list[str]


class Outcome(NamedTuple):
    """What became of it: one of KINDS, why, and what was printed."""

    kind: str
    why: str
    text: str


def actions_of(script: str) -> list[argparse.Action]:
    """The flags of a script, or of its sub-command."""
    name, _, command = script.partition(" ")
    found: list[argparse.ArgumentParser] = []

    class Seen(Exception):
        pass

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        found.append(parser)
        raise Seen

    module, original = importlib.import_module(name.removesuffix(".py")), argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = stop
    try:
        with contextlib.suppress(Seen):
            module.parse_args([command] if command else [])
    finally:
        argparse.ArgumentParser.parse_known_args = original
    parser = found[0]
    if command:
        parser = next(x for x in parser._actions if isinstance(x, argparse._SubParsersAction)).choices[command]
    return [x for x in parser._actions if not isinstance(x, argparse._HelpAction)]


def cases_of(script: str, flags: Sequence[str], seen: set[tuple[str, str | None]], sample: int,
             ) -> Iterator[tuple[Case, Outcome | None]]:
    """Every flag of ``script`` with each value of its kind, or with ``sample`` of those that its type does not refuse,
    but flags that another script has alike, which are in ``seen``; and the outcome where it is known at once."""
    random = Random(script)
    command = script.split()[1:]
    for action in actions_of(script):
        if flags and action.dest not in flags:
            continue
        if (action.dest, action.help) in seen:
            continue
        seen.add((action.dest, action.help))
        beside = next((words.split() for names, words in BESIDE.get(script, {}).items()
                       if action.dest in names.split()), [])
        base = ALONE.get(action.dest, [*CASES[script], *beside])
        switch = action.nargs == 0
        numeric = not switch and is_numeric(action)
        values = ("",) if switch else NUMBERS if numeric else (*WORDS, *FILES)
        if action.choices:
            values = (*map(str, action.choices), "", "text")
        known = {value: refused_by_type(action, value) for value in values if action.option_strings and not switch}
        open_cases = [value for value in values if not known.get(value)]
        taken = set(random.sample(open_cases, min(sample or len(open_cases), len(open_cases))))
        for value in values:
            if not known.get(value) and value not in taken:
                continue
            times = action.nargs if isinstance(action.nargs, int) and not switch else 1
            if not action.option_strings:
                words = [*base[1:], "--", value]
            elif switch:
                words = [*base, action.option_strings[-1]]
            elif times > 1:
                words = [*base, action.option_strings[-1], *[value] * times]
            else:
                words = [*base, f"{action.option_strings[-1]}={value}"]
            yield Case(script, action.dest, value, [*command, *words]), known.get(value)


def cases_again(script: str, log: str) -> Iterator[tuple[Case, None]]:
    """The cases of ``script`` in the ``log`` of an earlier attack that did not go well."""
    for line in Path(log).read_text().splitlines():
        found = json.loads(line)
        if found["script"] == script and found["kind"] in KINDS[2:]:
            yield Case(script, found["flag"], found["value"], found["argv"]), None


def is_numeric(action: argparse.Action) -> bool:
    """Whether its type refuses a word and takes one of a few numbers."""
    def takes(text: str) -> bool:
        try:
            (action.type or str)(text)
        except (argparse.ArgumentTypeError, ValueError, TypeError):
            return False
        return True
    return not takes("images") and any(map(takes, ("1", "0.5", "32", "1,1")))


def tree(folder: Path) -> dict[str, tuple[int, ...]]:
    """What is in a folder: the kind, size and time of each file, and of what is not one."""
    found = {}
    for place, names, files in os.walk(folder):
        for name in (*names, *files):
            path = f"{place}/{name}"
            kept = os.lstat(path)
            regular = stat.S_ISREG(kept.st_mode)
            found[os.path.relpath(path, folder)] = (stat.S_IFMT(kept.st_mode), kept.st_size * regular,
                                                    kept.st_mtime_ns * regular)
    return found


def refused_by_type(action: argparse.Action, value: str) -> Outcome | None:
    """The outcome if the flag's own type refuses ``value`` in words, which needs no process; else None."""
    try:
        (action.type or str)(value)
    except argparse.ArgumentTypeError as error:
        return Outcome("refused", "", f"error: argument {action.option_strings[-1]}: {error}")
    except Exception:  # noqa: BLE001 - the process will tell
        return None
    return None


def child(case: Case, place: Path, log: Path) -> None:
    """The forked process: the script as from a shell in ``place``."""
    os.chdir(place)
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT, 0o666)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2):
        os.dup2(output, number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        setattr(sys, name, io.TextIOWrapper(io.FileIO(number, "w", closefd=False), write_through=True))
    mapped = int(re.search(r"VmSize:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 30,) * 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES,) * 2)  # of one user; what is asked for could be any number
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.getuid() == 0:
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    os.environ["HOME"] = str(place)
    name = case.script.split()[0].removesuffix(".py")
    sys.argv = [f"{name}.py", *case.argv]
    module, errors = importlib.import_module(name), importlib.import_module("runtime.errors")
    code = 0
    try:
        errors.run_script(module.main)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:  # noqa: BLE001 - to be printed as the interpreter would
        import traceback
        traceback.print_exc()
        code = 1
    os._exit(code)


def run(case: Case, data: Path, room: Path, seconds: float) -> Outcome:
    """One case in its own copy of the data."""
    parent = Path(tempfile.mkdtemp(dir=room))  # a case may write beside its folder, as in ..
    parent.chmod(0o777)
    place, log = parent / "place", parent / "log"
    try:
        subprocess.run(["cp", "-a", str(data), str(place)], check=True)  # pipes and sockets too
        before = tree(place)
        pid = os.fork()
        if not pid:
            try:
                child(case, place, log)
            finally:
                os._exit(99)
        code = ended(pid, seconds)
        is_long = code is None and b"plan: " in log.read_bytes()  # a run, as long as was asked for
        if is_long:
            os.kill(pid, signal.SIGTERM)
            code = ended(pid, seconds)
        if code is None:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        text = log.read_bytes().decode(errors="replace")
        if code is None:
            return Outcome("hung", "", text)
        if is_long and code == 75:
            return Outcome("accepted", "paused in a long run", text)
        return judge(case, code, text, before, place)
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def ended(pid: int, seconds: float) -> int | None:
    """The exit code of a child that ends within ``seconds``; None if it does not."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None


def judge(case: Case, code: int, text: str, before: dict[str, tuple[int, ...]], place: Path) -> Outcome:
    """Which of KINDS a case is."""
    after = tree(place)
    changed = sorted(name for name in before if after.get(name) != before[name])
    made = sorted(after.keys() - before.keys())
    own = {name for name in changed if case.value.startswith("run") and name.startswith("run/")}  # it may go on with it
    own |= {name for name in changed if case.flag == "output" and name == "results.jsonl"}  # takes one line more
    if "Traceback (most recent call last)" in text or code not in (0, 2, 3, 4, 75):
        return Outcome("traceback", f"exit code {code}", text)
    if set(changed) - own:
        return Outcome("silent", f"exit code {code}, changed {' '.join(changed)}", text)
    if code:
        sentences = [line for line in text.splitlines() if line.startswith("error: ")]
        several = case.script.startswith("inspect") or ": failed, " in text  # evaluate.py all runs the others
        if len(sentences) != 1 and not several:
            return Outcome("silent", f"exit code {code} with {len(sentences)} sentences", text)
        began = "could not be opened" in text  # an image, when a run has come to it
        left = [name for name in made if (place / name).is_file() and not name.startswith(".cache/")]  # of libraries
        if code == 2 and left and not several and not began:
            return Outcome("silent", f"refused and left {' '.join(left)}", text)
        return Outcome("refused", "", text)
    if problem := unsound(case, place, made):
        return Outcome("silent", problem, text)
    return Outcome("accepted", "", text)


def unsound(case: Case, place: Path, made: Sequence[str]) -> str:
    """What is wrong with the files that a case made; '' if nothing is."""
    import torch

    def finite(value: Any) -> bool:
        if isinstance(value, dict):
            return all(map(finite, value.values()))
        if isinstance(value, (list, tuple)):
            return all(map(finite, value))
        if isinstance(value, torch.Tensor):
            return not value.is_floating_point() or bool(value.isfinite().all())
        return not isinstance(value, float) or math.isfinite(value)

    for name in made:
        path = place / name
        if path.suffix == ".pth" and path.is_file():
            with contextlib.suppress(Exception):
                content = torch.load(path, map_location="cpu", weights_only=True)
                if not finite(content.get("state_dict", content)):
                    return f"{name} is not finite"
        if path.suffix in (".json", ".jsonl"):
            for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
                try:
                    content = json.loads(line)
                except ValueError:
                    return f"{name} is not JSON"
                if not finite(content):
                    return f"{name} holds a number that is not finite"
                if path.name == "config.json" and (typed := number(case.value)) is not None:
                    recorded = content.get(case.flag)
                    if isinstance(recorded, (int, float)) and not isinstance(recorded, bool) and recorded != typed:
                        return f"{case.flag} {case.value} is recorded as {recorded}"
    return ""


def number(text: str) -> float | None:
    """The number that a text is."""
    try:
        return float(text)
    except ValueError:
        return None


def main() -> int:
    """A row a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="SCRIPT", default=list(CASES), help="these alone; default: all")
    parser.add_argument("--flags", nargs="+", metavar="DEST", default=[], help="these alone, by their Python names")
    parser.add_argument("--all", action="store_true", help="flags that several scripts share in each; default: in one")
    parser.add_argument("--sample", type=int, default=0, metavar="N",
                        help="of a flag's values that its type lets pass take N at random; default: all")
    parser.add_argument("--show", nargs="*", choices=KINDS, default=["silent", "traceback", "hung"],
                        help="cases that are printed; default: silent traceback hung")
    parser.add_argument("--seconds", type=float, default=60, help="after which a case hangs; default 60")
    parser.add_argument("--jobs", type=int, default=2, help="cases at once; default 2")
    parser.add_argument("--again", metavar="FILE", help="the cases that this --log calls silent, traceback or hung")
    parser.add_argument("--log", metavar="FILE", help="JSON lines, one a case")
    args = parser.parse_args()
    for name in {script.split()[0] for script in CASES}:
        importlib.import_module(name.removesuffix(".py"))
    for name in ("torch.utils.tensorboard", "torchvision", "sklearn.linear_model", "multiprocessing.popen_fork",
                 "encodings.utf_8_sig"):  # the rest of Python may lie where NOBODY cannot read
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    bad = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        os.chmod(folder, 0o755)  # noqa: PTH101
        data, room = Path(folder) / "data", Path(folder) / "room"
        room.mkdir()
        make_data(data)
        if os.getuid() == 0:
            subprocess.run(["chown", "-hR", f"{NOBODY}:{NOBODY}", folder], check=True)
        print("| script | tried | refused | accepted | silently wrong | traceback | hung |\n|---|" + "---|" * 6)
        seen: set[tuple[str, str | None]] = set()
        for script in args.only:
            made = list(cases_again(script, args.again) if args.again else
                        cases_of(script, args.flags, set() if args.all else seen, args.sample))
            cases, refused = [case for case, _ in made], [end for _, end in made]
            ends = pool.map(lambda case, end: end or run(case, data, room, args.seconds), cases, refused)
            found: Counter[str] = Counter()
            shown = []
            for case, outcome in zip(cases, ends, strict=True):
                found[outcome.kind] += 1
                if args.log:
                    with open(args.log, "a") as file:  # noqa: PTH123
                        file.write(json.dumps({**case._asdict(), **outcome._asdict()}) + "\n")
                if outcome.kind in args.show:
                    last = (outcome.text.strip().splitlines() or [""])[-1]
                    shown.append(f"{outcome.kind}: {case.flag} {case.value[:60]!r}: {outcome.why}: {last[:300]}")
            print(f"| {script} | {len(cases)} | " + " | ".join(str(found[kind]) for kind in KINDS) + " |", flush=True)
            for line in shown:
                print(f"  {line}".encode(errors="backslashreplace").decode(), flush=True)
            bad += found["silent"] + found["traceback"] + found["hung"]
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
