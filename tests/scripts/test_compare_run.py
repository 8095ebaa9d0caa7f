"""compare_methods.sh from start to end: each command is parsed by the real script, and its result made up."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import compare_run  # noqa: E402
import compare_search  # noqa: E402
from compare_work import Comparison  # noqa: E402

from runtime.errors import UserError  # noqa: E402

METHODS = ["coss", "seed", "compress", "bingo", "disco", "smd", "dist", "dino", "dinoss", "cosine", "mse", "rkd",
           "moco", "coss_centred"]


class Commands:
    """Stands for Comparison.python."""

    def __init__(self):
        self.done, self.break_down = [], lambda args: None

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
                 {"group": "knn", "step": steps, "top1": 50.04 - abs(args.lr - 0.1)}]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (folder / "student.pth").touch()

    def compute_knn(self, args):
        if args.command == "mine":
            Path(args.output).mkdir(parents=True)
            (Path(args.output) / "closek_info.json").write_text(json.dumps({"image_size": 64}))
        return {"knn": [{"top1": 50.0}], "test_images": 4000}

    def evaluate(self, args):
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
    (tmp_path / "shipped.txt").write_text("\n".join(f"{name} {(i + 1) / 100}" for i, name in enumerate(METHODS)))
    return ["compare_run.py", "--data", "demo", "--teacher", str(tmp_path / "teacher.pth"),
            "--output", str(tmp_path / "out"),
            "--student", "resnet18", "--stem", "cifar", "--rates", str(tmp_path / "shipped.txt"), "--passes", "6000",
            "--epochs", "5", "--batch", "32", "--nearest-k", "3", "--total-k", "7", "--queue", "64", "--every", "5",
            "--search-passes", "3000", "--gpus", "1", "--jobs", "2", "--workers", "0",
            "--subset", "1", "--minutes", "0",
            "--methods", *methods, "--seeds", *map(str, seeds), "--factors", "0.5", "2", *more]


def run(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", words)
    compare_run.main()


def trained(commands):
    """(method, seed) -> the command line of its training, the measuring of the speed left out."""
    return {(Path(args.output).parent.name): args for script, args in commands.done
            if script == "train_distill.py" and "speed" not in args.output}


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
    run(monkeypatch, flags(tmp_path, "--jobs", "1", methods=["coss", "dist", "mse"], seeds=[0]))
    assert [Path(args.output).parent.name for script, args in commands.done if script == "train_distill.py"
            and "speed" not in args.output] == ["coss-0", "dist-0", "mse-0"]


def test_search_takes_the_best_rate_and_one_that_ends_in_no_numbers_is_not_it(tmp_path, commands, monkeypatch):
    def break_down(args):
        if getattr(args, "loss", None) == "mse" and args.lr == 0.22:
            raise UserError("train_distill.py failed: error: the loss is not finite at epoch 0, step 3")

    commands.break_down = break_down
    run(monkeypatch, flags(tmp_path, "--search", methods=["coss", "mse"]))
    candidates = [args for script, args in commands.done if script == "train_distill.py" and "speed" not in args.output]
    assert {(args.loss, args.lr) for args in candidates} == {("coss", 0.005), ("coss", 0.02), ("mse", 0.055)}
    assert all(args.data == str(tmp_path / "out/search/images") and args.seed == 1000 for args in candidates)
    assert not [script for script, args in commands.done if script == "evaluate.py"]  # the test images have no say
    lines = (tmp_path / "out/rates.txt").read_text().splitlines()
    assert lines[2:] == ["coss 0.02 # 0.005: 49.9, 0.02: 50.0", "mse 0.055 # 0.055: 50.0, 0.22: 0.0"]

    commands.done.clear()
    run(monkeypatch, flags(tmp_path, methods=["coss"], seeds=[0]))
    assert trained(commands)["coss-0"].lr == 0.02
