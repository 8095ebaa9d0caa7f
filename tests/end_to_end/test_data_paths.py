"""Both training scripts with every way of making views: the same draws, nearly the same losses."""

import json

import numpy as np
import pytest
from helpers.images import render_classes
from helpers.runs import metrics
from helpers.scripts import in_this_process, well
from PIL import Image

WAYS = {"fast": [], "pil": ["--data-path", "pil"], "host": ["--cache", "host"], "device": ["--cache", "device"],
        "pool": ["--image-cache", "0.01"]}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    render_classes(root, 6)
    return root


@pytest.fixture(scope="module")
def teachers(tree, tmp_path_factory):
    """A one-epoch MoCo by each way."""
    work = tmp_path_factory.mktemp("teachers")
    for name, flags in WAYS.items():
        well(in_this_process("train_teacher.py", *teacher_flags(tree), *flags, "--output", work / name))
    return work


def teacher_flags(tree):
    return ["--data", tree, "--arch", "squeezenet_small", "--stem", "cifar", "-b", 8, "--bn-parts", 2, "--moco-k", 16,
            "--epochs", 1, "-p", 1, "--device", "cpu", "--image-size", 32, "--workers", 0]


def distil_flags(tree, teachers):
    return ["--data", tree, "-a", "squeezenet_small", "--distill", teachers / "fast" / "teacher.pth", "--sampler",
            "random", "-b", 8, "--epochs", 1, "-p", 1, "--lr", 0.001, "--device", "cpu", "--workers", 0]


def losses(folder):
    return np.array([line["loss"] for line in metrics(folder)])


def test_a_teacher_learns_the_same_by_every_way(teachers):
    expected = losses(teachers / "pil")
    assert len(expected) == 3
    for name in WAYS:
        config = json.loads((teachers / name / "config.json").read_text())
        assert (config["data_path"], config["cache"]) == ("pil" if name == "pil" else "fast",
                                                          name if name in ("host", "device") else "none")
        assert losses(teachers / name) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("way", WAYS)
def test_a_student_learns_by_every_way_and_goes_on_by_another(way, tree, teachers, tmp_path):
    flags = distil_flags(tree, teachers)
    well(in_this_process("train_distill.py", *flags, *WAYS[way], "--output", tmp_path / "run"))
    well(in_this_process("train_distill.py", *flags, *WAYS["pil"], "--output", tmp_path / "pil"))
    assert losses(tmp_path / "run")[0] == pytest.approx(losses(tmp_path / "pil")[0], rel=0.02)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "pil"), rel=0.2)
    again = well(in_this_process("train_distill.py", *flags, "--data-path", "pil", "--output", tmp_path / "run"))
    assert "resuming from" in again.out


def test_the_pool_of_images_is_shared_by_workers_and_its_hit_rate_is_logged(tree, tmp_path):
    flags = [*teacher_flags(tree), "--epochs", 2, "--workers", 2, "--image-cache", "0.01"]
    done = well(in_this_process("train_teacher.py", *flags, "--output", tmp_path / "run"))
    said = [line for line in done.out.splitlines() if "hit rate" in line]
    assert len(said) == 2
    assert "24 of 24 images" in said[-1]
    assert "hit rate 50.0 %" in said[-1]  # the second epoch finds all 24


@pytest.mark.parametrize("script", ["train_teacher.py", "train_distill.py"])
def test_what_does_not_go_together_is_refused(script, tree, teachers, tmp_path):
    flags = teacher_flags(tree) if script == "train_teacher.py" else distil_flags(tree, teachers)
    done = in_this_process(script, *flags, "--data-path", "pil", "--cache", "device", "--output", tmp_path / "run")
    assert (done.rc, done.err.count("\n")) == (2, 1)
    assert "--data-path pil" in done.err
    assert not (tmp_path / "run").exists()


def test_images_of_several_sizes_are_not_cached(tree, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, size in enumerate([(32, 32)] * 9 + [(33, 32)]):
        Image.new("RGB", size, (i, 9, 99)).save(folder / f"{i}.png")
    flags = teacher_flags(folder)
    done = in_this_process("train_teacher.py", *flags, "--cache", "device", "--output", tmp_path / "run")
    assert (done.rc, done.err.count("\n")) == (2, 1)
    assert "9.png has 33 x 32" in done.err
    assert not (tmp_path / "run").exists()
