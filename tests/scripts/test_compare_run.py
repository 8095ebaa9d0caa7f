"""compare_methods.sh from start to end: each command is parsed by the real script, and its result made up."""

import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import compare_run  # noqa: E402
import compare_search  # noqa: E402
from compare_plan import Budget  # noqa: E402
from compare_work import Children, Comparison  # noqa: E402

from runtime.errors import RunPaused, UserError  # noqa: E402

METHODS = ["coss", "seed", "compress", "bingo", "disco", "smd", "dist", "dino", "dinoss", "cosine", "mse", "rkd",
           "moco", "coss_centred"]


class Commands:
    """Stands for Comparison.python."""

    def __init__(self):
        self.done, self.break_down = [], lambda args: None
        self.score = lambda args: 50.0

    def __call__(self, log, *words, result=None, slot=None, processes=1, all_cores=False):
        script, *flags = map(str, words)
        log.parent.mkdir(parents=True, exist_ok=True)
        args = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
        self.break_down(args)
        self.done.append((script, args))
        made = getattr(self, f"{script.removesuffix('.py')}")(args)
        if result:
            result.write_text(json.dumps(made))

    def train_distill(self, args):
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(vars(args), default=str))
        steps = args.epochs * args.epoch_steps
        lines = [{"group": "train", "step": steps, "images_per_second": 100.0},
                 {"group": "knn", "step": steps, "top1": self.score(args)}]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (folder / "student.pth").touch()

    def compute_knn(self, args):
        if args.command == "mine":
            Path(args.output).mkdir(parents=True)
            (Path(args.output) / "closek_info.json").write_text(json.dumps({"image_size": 64}))
        return {"knn": [{"top1": 50.0}], "test_images": 4000, "train_images": 20_000}

    def evaluate(self, args):
        if args.command == "robustness":
            assert (args.ood, args.subset) == ([("shifted", "elsewhere")], 0.5)
            return {"metrics": {"sets": {"test": {"top1": 60.0}}}}
        if args.command == "linear":
            return {"metrics": {"top1": 60.0}}
        assert args.subset == 0.5  # 2,000 of 4,000
        Path(args.output).mkdir(parents=True)
        return {"metrics": {name: {"shared": {"11": 7.0}} for name in args.names}}


@pytest.fixture
def commands(monkeypatch):
    found = Commands()
    monkeypatch.setattr(Comparison, "python", lambda self, *words, **options: found(*words, **options))
    monkeypatch.setattr(compare_run.subprocess, "run", lambda words, check: subprocess.CompletedProcess(words, 0))
    monkeypatch.setattr(compare_search, "hold_out", lambda data, folder: None)
    return found


def flags(tmp_path, *more, methods=METHODS, seeds=(0, 1)):
    (tmp_path / "teacher.pth").write_bytes(b"weights")
    (tmp_path / "shipped.txt").write_text("\n".join(f"{name} {(i + 1) / 100} 1" for i, name in enumerate(METHODS)))
    return ["compare_run.py", "--data", "demo", "--teacher", str(tmp_path / "teacher.pth"),
            "--output", str(tmp_path / "out"),
            "--student", "resnet18", "--stem", "cifar", "--rates", str(tmp_path / "shipped.txt"), "--passes", "6000",
            "--epochs", "10", "--batch", "32", "--nearest-k", "3", "--total-k", "7", "--queue", "64", "--every", "10",
            "--gpus", "1", "--jobs", "2", "--workers", "0",
            "--subset", "1", "--minutes", "0",
            "--methods", *methods, "--seeds", *map(str, seeds), "--factor", "2", "--amp", "auto",
            "--shifted", "", *more]


def run(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", words)
    compare_run.main()


def trained(commands):
    """(method, seed) -> the command line of its training, the measuring of the speed left out."""
    return {(Path(args.output).parent.name): args for script, args in commands.done
            if script == "train_distill.py" and "speed" not in args.output}


TRAINING = """import os, pathlib, signal, sys
def save(*_):
    pathlib.Path(sys.argv[1] + ".saved").touch()
    os._exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1]).touch()
os.kill(os.getppid(), int(sys.argv[2]))
signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_reaches_the_trainings_and_nothing_else_starts(tmp_path, monkeypatch, number):
    """Each training sends it as soon as it can answer it itself; the first ends all."""
    (tmp_path / "training.py").write_text(TRAINING)
    before = signal.getsignal(number)

    def work(slot, place):
        c.python(tmp_path / "log", tmp_path / "training.py", tmp_path / f"run{place}", int(number))

    monkeypatch.setattr(sys, "argv", flags(tmp_path))
    with pytest.raises(RunPaused), Children() as children:
        c = Comparison(compare_run.parse_args(), tmp_path, Budget(6000, 10, 32, 3, 7).rounded(), children)
        c.pool("students", [lambda slot, i=i: work(slot, i) for i in range(6)], 0)
    started = {path.name for path in tmp_path.glob("run?")}
    assert 1 <= len(started) <= 2
    assert {path.stem for path in tmp_path.glob("*.saved")} == started
    assert not children.running
    assert signal.getsignal(number) == before
    with pytest.raises(RunPaused), Children():  # between two commands
        os.kill(os.getpid(), number)


def test_every_student_is_trained_and_scored_once(tmp_path, commands, monkeypatch, capsys):
    run(monkeypatch, flags(tmp_path))
    students = trained(commands)
    assert set(students) == {f"{method}-{seed}" for method in METHODS for seed in (0, 1)}
    for name, args in students.items():
        loss, _, seed = name.rpartition("-")
        per_image = {"smd": 2, "disco": 2, "bingo": 1.5}.get(loss, 1)
        images = args.batch_size * (1 + (args.nearest_k if args.sampler == "cf" else 0))
        assert images * per_image * args.epochs * args.epoch_steps == 5760
        assert (args.loss, args.seed, args.image_size, args.stem) == (loss, int(seed), 64, "cifar")
        assert args.lr == pytest.approx((METHODS.index(loss) + 1) / 100)
        assert (args.sampler == "cf") == (loss in ("coss", "coss_centred", "bingo"))
        assert args.head_bn == (loss in ("disco", "moco"))
    said = capsys.readouterr().out
    assert re.search(r"\nmse: rate \S+, warm-up \d of 10 periods, from \S+\.txt\n", said)
    assert re.search(r"28 students of 5,760 image passes, 2 side by side; at 100 passes a second", said)
    shared = json.loads((tmp_path / "out/overlap.json").read_text())
    assert set(shared) == set(students)

    commands.done.clear()
    run(monkeypatch, flags(tmp_path, seeds=(0, 1, 2)))  # goes on with what is new
    assert set(trained(commands)) == {f"{method}-2" for method in METHODS}
    overlaps = [args for script, args in commands.done if script == "evaluate.py" and args.command == "overlap"]
    assert [set(args.names) for args in overlaps] == [{f"{method}-2" for method in METHODS}]
    commands.done.clear()
    run(monkeypatch, flags(tmp_path, seeds=(0, 1, 2)))
    assert not commands.done
    run(monkeypatch, flags(tmp_path, "--shifted", "elsewhere", methods=["coss"]))  # one more score of what is there
    assert [args.command for script, args in commands.done if script == "evaluate.py"] == 5 * ["robustness"]
    assert len(list(tmp_path.glob("out/*/shifted.json"))) == 5  # the teacher, two untrained students and two trained


def test_other_settings_are_refused(tmp_path, commands, monkeypatch):
    run(monkeypatch, flags(tmp_path, methods=["coss"]))
    with pytest.raises(UserError, match="made with other settings .batch was 32, now 16.; set OUT"):
        run(monkeypatch, flags(tmp_path, "--batch", "16", methods=["coss"]))
    with pytest.raises(UserError, match="TEACHER=nothing.pth is not a file"):
        run(monkeypatch, flags(tmp_path, "--teacher", "nothing.pth", methods=["coss"]))


def test_minutes_leave_the_rest_for_the_next_time(tmp_path, commands, monkeypatch, capsys):
    run(monkeypatch, flags(tmp_path, "--minutes", "0.5", methods=["coss", "dist"]))  # a student takes 57.6 s
    assert not trained(commands)
    assert "MINUTES=0.5 have passed" in capsys.readouterr().out
    run(monkeypatch, flags(tmp_path, "--minutes", "2", methods=["coss", "dist"]))
    assert len(trained(commands)) == 4


def test_a_failure_is_told_and_what_was_done_is_kept(tmp_path, commands, monkeypatch):
    def break_down(args):
        if getattr(args, "loss", None) == "dist":
            raise UserError("train_distill.py failed: the disk is full")

    commands.break_down = break_down
    with pytest.raises(UserError, match="the disk is full"):
        run(monkeypatch, flags(tmp_path, "--jobs", "1", methods=["coss", "dist", "mse"], seeds=[0]))
    assert set(trained(commands)) == {"coss-0"}
    commands.break_down = lambda args: None
    (tmp_path / "out/scoring.json").unlink()  # as if it had been stopped just before
    run(monkeypatch, flags(tmp_path, "--jobs", "1", methods=["coss", "dist", "mse"], seeds=[0]))
    assert [Path(args.output).parent.name for script, args in commands.done if script == "train_distill.py"
            and "speed" not in args.output] == ["coss-0", "dist-0", "mse-0"]


def searched(commands):
    """round -> (method, rate, warm-up, seed) of the trials, in the order in which they were trained."""
    found = {}
    for script, args in commands.done:
        if script == "train_distill.py" and "speed" not in args.output:
            found.setdefault(Path(args.output).parent.name, []).append(
                (args.loss, args.lr, args.warmup_epochs, args.seed))
    return found


def test_search_climbs_to_the_best_rate_and_warm_up_by_one_rule(tmp_path, commands, monkeypatch, capsys):
    """coss is best two rates up with warm-ups of 7 in 10, mse where it starts; each round halves what it is given."""
    def score(args):
        best = (0.04, 7) if args.loss == "coss" else (0.11, 1)
        return 90 - 20 * abs(math.log2(args.lr / best[0])) - abs(args.warmup_epochs - best[1])

    commands.score = score
    words = flags(tmp_path, "--search", "--passes", "12000", methods=["coss", "mse"])
    (tmp_path / "shipped.txt").write_text("coss 0.01 1\nmse 0.11 4\n")
    run(monkeypatch, words)
    trials = searched(commands)
    steps = {round: {args.epoch_steps for script, args in commands.done if f"/{round}/" in args.output
                     and args.loss == "mse"} for round in trials}
    assert steps == {"round1": {6}, "round2": {18}, "round3": {36}}  # x 10 x 32: 1,920 passes, 5,760, 11,520
    first = {name: {(rate, warmup) for loss, rate, warmup, seed in trials["round1"] if loss == name}
             for name in ("coss", "mse")}
    assert first["mse"] == {(r, w) for r in (0.055, 0.11, 0.22) for w in (1, 4, 7)} | {(0.11, 0)}
    assert first["coss"] == {(r, w) for r in (0.005, 0.01, 0.02) for w in (1, 4, 7)} | {(0.04, 7), (0.08, 7), (0.04, 4),
                                                                                      (0.04, 10), (0.02, 10)}
    assert all(seed == 1000 for *_, seed in trials["round1"] + trials["round2"])
    assert {trial[1:3] for trial in trials["round2"] if trial[0] == "mse"} == {(0.11, 1), (0.11, 0), (0.11, 4)}
    assert {trial[1:] for trial in trials["round3"] if trial[0] == "mse"} == {
        (0.11, warmup, seed) for warmup in (0, 1) for seed in (1000, 1001)}
    assert not [script for script, args in commands.done if script == "evaluate.py"]  # the test images have no say
    assert all(args.data == str(tmp_path / "out/search/images") for script, args in commands.done
               if script == "train_distill.py")
    lines = (tmp_path / "out/rates.txt").read_text().splitlines()
    assert lines[2:] == ["coss 0.04 7 # 0.04 7: 90.0 90.0, 0.04 4: 87.0 87.0",
                         "mse 0.11 1 # 0.11 1: 90.0 90.0, 0.11 0: 89.0 89.0"]
    assert re.search(r"rate and warm-up of 2 methods, 2 trainings side by side at 100 passes a second each: 0.2 to 0.3 "
                     "hours", capsys.readouterr().out)

    commands.done.clear()
    run(monkeypatch, flags(tmp_path, "--passes", "12000", methods=["coss"], seeds=[0]))
    assert (trained(commands)["coss-0"].lr, trained(commands)["coss-0"].warmup_epochs) == (0.04, 7)
    run(monkeypatch, flags(tmp_path, "--search", "--passes", "12000", methods=["mse"]))  # keeps what was found for coss
    assert (tmp_path / "out/rates.txt").read_text().splitlines()[2:] == [lines[3], lines[2]]


def test_search_resumes_and_a_training_whose_numbers_end_counts_as_0(tmp_path, commands, monkeypatch):
    def break_down(args):
        if getattr(args, "loss", None) == "mse" and args.lr >= 0.22:
            raise UserError("train_distill.py failed: error: the loss is not finite at epoch 0, step 3")
        if getattr(args, "loss", None) == "mse" and getattr(args, "seed", 0) == 1001:
            raise UserError("train_distill.py failed: the disk is full")

    commands.break_down = break_down
    words = flags(tmp_path, "--search", methods=["mse"])
    (tmp_path / "shipped.txt").write_text("mse 0.11 1\n")
    with pytest.raises(UserError, match="the disk is full"):
        run(monkeypatch, words)
    before = searched(commands)
    commands.done.clear()
    commands.break_down = lambda args: None
    run(monkeypatch, words)
    assert set(searched(commands)) == {"round3"}
    assert not set(searched(commands)["round3"]) & set(before.get("round3", []))
    assert "0.22" not in (tmp_path / "out/rates.txt").read_text()
