"""compare_methods.sh: what each method may spend, rates, the held-out images, and the report of a made-up folder."""

import argparse
import json
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from compare_plan import Budget, Tuned, plan_of, read_tuned  # noqa: E402
from compare_report import gather, picture, rows_of, table  # noqa: E402
from compare_search import hold_out  # noqa: E402
from compare_work import ENDED, Comparison, ended  # noqa: E402

from data.datasets import open_source  # noqa: E402
from losses import LOSSES  # noqa: E402
from runtime.errors import UserError  # noqa: E402

# Student forward passes of an image of the batch, counted by hand from each method's paper.
PASSES = {"coss": 1, "coss_centred": 1, "seed": 1, "compress": 1, "dist": 1, "dino": 1, "dinoss": 1, "cosine": 1,
          "mse": 1, "rkd": 1, "moco": 1, "smd": 2, "disco": 2, "bingo": Fraction(3, 2)}


def test_an_entry_may_carry_flags():
    budget = Budget(9600, 10, 32, 3, 15).rounded()
    plain, more, none = (plan_of(text, budget) for text in ("coss", "coss:l_1=0.5,nearest-k=7", "coss:nearest-k=0"))
    assert (more.flags, more.nearest_k, more.anchors) == ((*plain.flags, "--l_1", "0.5"), 7, 4)
    assert (none.sampler, none.anchors, none.epoch_steps) == ("random", 32, plain.epoch_steps)
    assert plain.flags == ("--head-init", "random")  # the paper's, which is not the default
    assert plan_of("coss:head-init=teacher", budget).flags == ("--head-init", "teacher")


@pytest.mark.parametrize(("text", "said"), [
    ("coss:l_1", "coss:l_1.*flags of train_distill.py with their values"), ("coss@near", "only random or cf"),
    ("coss:nearest-k=x", "coss:nearest-k=x.*x")])
def test_an_entry_that_cannot_be_read_is_refused(text, said):
    with pytest.raises(UserError, match=said):
        plan_of(text, Budget(9600, 10, 32, 3, 15).rounded())


@pytest.mark.parametrize("passes", [1, 1000, 6912, 50_000, 1_996_800])
@pytest.mark.parametrize(("epochs", "batch"), [(9, 32), (10, 64), (20, 256), (7, 12)])
def test_every_method_spends_the_very_same_passes(passes, epochs, batch):
    budget = Budget(passes, epochs, batch, nearest_k=3, total_k=15).rounded()
    assert budget.passes <= passes or passes < 6 * epochs * batch
    assert passes - budget.passes < 6 * epochs * batch
    for entry in [*LOSSES, "coss@random", "cosine@cf", "coss+cosine"]:
        plan = plan_of(entry, budget)
        images = plan.anchors * (1 + plan.nearest_k)
        per_image = max(PASSES[name] for name in plan.loss.split("+"))
        assert images == batch
        assert images * per_image * plan.epoch_steps * epochs == budget.passes


def test_who_takes_neighbours():
    budget = Budget(9600, 10, 32, nearest_k=3, total_k=15).rounded()
    found = {entry: plan_of(entry, budget) for entry in ("coss", "coss@random", "seed", "seed@cf", "bingo")}
    assert {entry: (p.sampler, p.anchors, p.nearest_k, p.total_k) for entry, p in found.items()} == {
        "coss": ("cf", 8, 3, 15), "coss@random": ("random", 32, 0, 0), "seed": ("random", 32, 0, 0),
        "seed@cf": ("cf", 8, 3, 15), "bingo": ("cf", 16, 1, 5)}


@pytest.mark.parametrize(("entry", "batch", "message"), [
    ("cos", 32, "--loss cos is unknown"), ("coss@cluster", 32, "random or cf"), ("coss", 33, "multiple of 4")])
def test_plans_that_make_no_sense(entry, batch, message):
    with pytest.raises(UserError, match=message):
        plan_of(entry, Budget(9600, 10, batch, 3, 15).rounded())


def test_rates_of_the_first_file_that_has_one(tmp_path):
    (tmp_path / "own.txt").write_text("# found so\ncoss 0.01 4 # 1 2 3\nseed@cf 0.5 0\n\n")
    (tmp_path / "shipped.txt").write_text("coss 0.004 1\nseed 0.1 1\nsmd 0.2 2# so\n")
    files = [tmp_path / "own.txt", tmp_path / "shipped.txt", tmp_path / "none.txt"]
    own, shipped, _ = files
    assert read_tuned(["coss", "coss:l_1=0", "coss@random", "seed", "seed@cf", "seed@cf:l_0=1", "smd"], files) == {
        "coss": (0.01, 4, own), "coss:l_1=0": (0.01, 4, own), "seed@cf:l_0=1": (0.5, 0, own),
        "coss@random": (0.01, 4, own), "seed": (0.1, 1, shipped), "seed@cf": (0.5, 0, own), "smd": (0.2, 2, shipped)}
    with pytest.raises(UserError, match="no learning rate for mse, rkd in .*--search"):
        read_tuned(["coss", "mse", "rkd"], files)


@pytest.mark.parametrize("line", ["coss 0.01", "coss 0.01 1 2", "coss x 1", "coss 0.01 1.5"])
def test_a_line_of_rates_that_is_not_one(line, tmp_path):
    (tmp_path / "rates.txt").write_text(line)
    with pytest.raises(UserError, match="rates.txt holds a line with .* expected RATE and WARM-UP"):
        read_tuned(["coss"], [tmp_path / "rates.txt"])


def test_held_out_images_are_the_last_fifth_of_each_class(tmp_path):
    for split, name, count in (("train", "a", 10), ("train", "b", 7), ("test", "a", 3)):
        (tmp_path / "set" / split / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "set" / split / name / f"{i}.png")
    hold_out(str(tmp_path / "set"), tmp_path / "out")
    train, val = (open_source(str(tmp_path / "out"), split, labelled=True) for split in ("train", "test"))
    reds = [[source.pixels(i)[0, 0, 0].item() for i in range(len(source))] for source in (train, val)]
    assert reds == [[*range(8), *range(6)], [8, 9, 6]]
    assert val.labels.tolist() == [0, 0, 1]
    hold_out("not read again", tmp_path / "out")


def student(folder, name, seed, knn, linear, shared):
    """What a trained and scored student leaves."""
    path = folder / f"{name}-{seed}"
    (path / "run").mkdir(parents=True)
    (path / "knn.json").write_text(json.dumps({"knn": [{"k": 10, "T": 0.07, "top1": knn}, {"top1": 0}]}))
    (path / "linear.json").write_text(json.dumps({"metrics": {"top1": linear}}))
    near = (1, "cf") if name == "coss" else (15, "random")
    config = {"loss": name, "lr": 0.01, "warmup_epochs": 4, "epochs": 10, "epoch_steps": 4,
              "batch_size": 16 if name == "coss" else 32, "nearest_k": near[0], "sampler": near[1],
              "data": "images/cifar", "subset": 1, "image_size": 64, "student_arch": "small", "teacher_arch": "large",
              "teacher_sha256": "ab", "precision": "bf16",
              "starts": [{"hardware": "a CPU", "torch": "2.6", "commit": "12+"}]}
    (path / "run/config.json").write_text(json.dumps(config))
    lines = [{"step": 4, "group": "train", "student_norm": 10.0 + int(seed), "row_cosine": 0.25,
              "images_per_second": 100},
             {"step": 20, "group": "knn", "top1": knn / 2},
             {"step": 40, "group": "train", "student_norm": 100.0, "row_cosine": 0.75,
              "images_per_second": 300},
             {"step": 40, "group": "knn", "top1": knn}]
    (path / "run/metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    overlap = folder / "overlap.json"
    known = json.loads(overlap.read_text()) if overlap.exists() else {}
    overlap.write_text(json.dumps({**known, f"{name}-{seed}": {"shared": {"11": shared}}}))


def test_numbers_that_ended_are_a_result(tmp_path):
    """One seed of two, or all: said in the table, and no other method suffers."""
    student(tmp_path, "coss", 0, 50, 60, 9)
    student(tmp_path, "mse", 0, 20, 30, 3)
    for name in ("mse-1", "rkd-0"):
        student(tmp_path, *name.split("-"), 1, 1, 1)
        for score in ("knn", "linear"):
            (tmp_path / f"{name}/{score}.json").unlink()
        (tmp_path / name / "run" / ENDED).touch()
    records = gather(tmp_path)
    yardsticks, methods = rows_of(records)
    assert list(methods) == ["coss", "mse", "rkd"]
    assert {key: records[0][key] for key in ("name", "passes", "images_per_second", "hardware", "data")} == {
        "name": "coss", "passes": 10 * 4 * 16 * 2, "images_per_second": 200, "hardware": "a CPU", "data": "cifar"}
    lines = table(yardsticks, methods).splitlines()
    assert ("| mse | 40 | 32 | 0.01 | 4 of 10 | 1, and 1 whose numbers ended | 20.0 | 30.0 | 3.0 | 10.5 → 100 "
            "| 0.25 → 0.75 |") in lines
    assert "| rkd | 40 | 32 | 0.01 | 4 of 10 | 0, and 1 whose numbers ended | – | – | – |" in lines[-1]
    pytest.importorskip("matplotlib")
    assert picture(tmp_path, yardsticks, methods).stat().st_size > 10_000


@pytest.mark.parametrize(("said", "passes_over"), [("the loss is not finite at epoch 1", True), ("no space", False)])
def test_a_training_whose_numbers_end_leaves_a_mark(said, passes_over, tmp_path):
    c = Comparison.__new__(Comparison)
    c.args = argparse.Namespace(data="d", subset=1, student="a", stem="b", teacher="c", queue=1, every=1, workers=0,
                                gpus=1, amp="auto", shifted="")
    c.folder, c.budget = tmp_path, Budget(384, 2, 32, 1, 5)
    c.plans = {"mse": plan_of("mse", c.budget)}
    c.image_size = lambda: 32

    def fail(log, *_, **__):
        log.parent.mkdir(parents=True)
        raise UserError(said)

    c.python, scored = fail, []
    c.score = lambda *_, **__: scored.append(1)
    if passes_over:
        c.student("mse", 0, Tuned(0.1, 1), 0)
    else:
        with pytest.raises(UserError, match=said):
            c.student("mse", 0, Tuned(0.1, 1), 0)
    assert ended(tmp_path / "mse-0/run") == passes_over
    assert not scored


def test_report(tmp_path):
    with pytest.raises(UserError, match="holds no student"):
        gather(tmp_path)
    for name, scores in {"smd": [(30, 40, 5)], "coss": [(50, 60, 9), (54, 61, 10)]}.items():
        for seed, (knn, linear, shared) in enumerate(scores):
            student(tmp_path, name, seed, knn, linear, shared)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/knn.json").write_text(json.dumps({"knn": [{"top1": 70}]}))
    (tmp_path / "teacher/linear.json").write_text(json.dumps({"metrics": {"top1": 80}}))
    errors = {"fog": {"1": 10, "5": 30}, "snow": {"1": 50, "5": 70}}
    (tmp_path / "teacher/shifted.json").write_text(json.dumps(
        {"metrics": {"corruptions": {"shifted": {"errors": errors}}}}))
    yardsticks, methods = rows_of(gather(tmp_path))
    assert list(methods) == ["coss", "smd"]
    assert (yardsticks["teacher"]["shifted"], yardsticks["teacher"]["corruptions"]) == ([60], [{"fog": 80, "snow": 40}])
    assert methods["coss"]["curve"] == [[[640, 25], [1280, 50]], [[640, 27], [1280, 54]]]
    assert methods["smd"]["curve"] == [[[1280, 15], [2560, 30]]]
    lines = table(yardsticks, methods).splitlines()
    assert "| *teacher* | – | – | – | – | 1 | 70.0 | 80.0 | – | – | – |" in lines
    assert ("| coss | 40 | 32 (16 x 2) | 0.01 | 4 of 10 | 2 | 52.0 ± 2.8 | 60.5 ± 0.7 | 9.5 ± 0.7 | 10.5 → 100 "
            "| 0.25 → 0.75 |") in lines
    assert "| smd | 40 | 64 | 0.01 | 4 of 10 | 1 | 30.0 | 40.0 | 5.0 | 10 → 100 | 0.25 → 0.75 |" in lines
    pytest.importorskip("matplotlib")
    assert picture(tmp_path, yardsticks, methods).stat().st_size > 10_000
