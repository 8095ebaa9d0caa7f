"""Flags and files that cannot be: one sentence, exit code 2, nothing written."""

import shutil

import pytest
import torch
import torchvision
from helpers.experiment import COMMON, TEACHER
from helpers.images import render_flat
from helpers.scripts import assert_refused, in_this_process, launched


@pytest.fixture(scope="session")
def bad(tmp_path_factory, tree, teacher):
    """Things to give in the wrong place."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    (folder / "html.pth").write_text("<!DOCTYPE html><html>404</html>")
    torch.save({"arch": "resnet34", "state_dict": {
        f"module.encoder_q.{k}": v for k, v in torchvision.models.resnet34().state_dict().items()}},
        folder / "resnet34.pth")
    render_flat(folder / "flat")
    (folder / "file").write_text("in the way")
    return folder


# flags replaced or added -> words that the one line on stderr must hold
DISTIL_REFUSALS = {
    "missing data": (["--data", "{bad}/nowhere"], ["--data", "nowhere"]),
    "empty data": (["--data", "{bad}/empty"], ["--data", "empty", "no image"]),
    "unknown student": (["-a", "resnet81"], ["-a resnet81", "resnet18"]),
    "unknown teacher": (["-k", "resnet5O"], ["-k resnet5O", "resnet50"]),
    "no such checkpoint": (["--distill", "{bad}/nowhere.pth"], ["--distill", "nowhere.pth"]),
    "web page": (["--distill", "{bad}/html.pth"], ["--distill", "html.pth", "web page"]),
    "checkpoint of another arch": (["--distill", "{bad}/resnet34.pth", "-k", "resnet18"],
                                   ["resnet34.pth", "unexpected", "resnet18"]),
    "neighbours of another data set": (["--data", "{bad}/flat"], ["--closek-info", "12"]),
    "too few columns": (["--total-k", "13"], ["--closek-info", "12 neighbours", "--total-k", "13"]),
    "nearest-k above total-k": (["--nearest-k", "7"], ["--nearest-k 7", "--total-k 6"]),
    "batch above the images": (["-b", "41"], ["--batch-size 41", "40 images"]),
    "no neighbour file": (["--closek-info", "{bad}/nowhere.npy"], ["--closek-info", "nowhere.npy"]),
    "a checkpoint for neighbours": (["--closek-info", "{teacher}"], ["--closek-info", "teacher.pth"]),
    "stem on patches": (["-a", "swin_t", "--stem", "cifar"], ["--stem cifar", "swin_t"]),
    "subset of nothing": (["--subset", "0.01"], ["--subset 0.01"]),
    "subset above one": (["--subset", "2"], ["--subset 2"]),
    "fp16 on a CPU": (["--amp", "fp16"], ["--amp fp16"]),
    "no such resume file": (["--resume", "{bad}/nowhere.pth"], ["--resume", "nowhere.pth"]),
    "a teacher to resume from": (["--resume", "{teacher}"], ["--resume", "teacher.pth"]),
    "k-NN without labels": (["--data", "{bad}/flat", "--sampler", "random", "--knn-every", "1"], ["--knn-data"]),
    "unknown flag": (["--nearestk", "3"], ["--nearestk"]),
    "no such loss": (["--loss", "nothing"], ["--loss", "coss"]),
}


@pytest.mark.parametrize("case", DISTIL_REFUSALS)
def test_train_distill_refuses(case, distil_flags, bad, teacher, tmp_path):
    changed, words = DISTIL_REFUSALS[case]
    changed = [word.format(bad=bad, teacher=teacher) for word in changed]
    done = in_this_process("train_distill.py", *distil_flags, "--output", tmp_path / "out", "--workers", 0, *changed)
    assert_refused(done, words)
    assert not (tmp_path / "out").exists()


def test_a_refusal_from_the_shell(distil_flags, tmp_path):
    """The same from a real shell's point of view: exit code, one line, nothing on stdout."""
    done = launched("train_distill.py", *distil_flags, "--output", tmp_path / "out", "--workers", 0, "--data",
                    tmp_path / "nowhere", "-a", "resnet18", "-k", "resnet18")  # a fresh one knows torchvision's alone
    assert_refused(done, ["--data", str(tmp_path / "nowhere")])
    assert done.out == ""
    assert not (tmp_path / "out").exists()


def test_cf_needs_its_file(tree, teacher, tmp_path):
    done = in_this_process("train_distill.py", "--data", tree / "train", "--distill", teacher, "--output",
                           tmp_path / "out", *COMMON)
    assert_refused(done, ["--closek-info", "compute_knn.py mine"])
    assert not (tmp_path / "out").exists()


def test_an_output_folder_of_a_different_run(run, distil_flags, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    done = in_this_process("train_distill.py", *distil_flags, "--output", copy, "--workers", 0, "--lr", 0.02)
    assert_refused(done, ["--output", str(copy), "lr was 0.001, now 0.02", "--resume"])
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_an_output_path_that_is_a_file(distil_flags, bad):
    done = in_this_process("train_distill.py", *distil_flags, "--output", bad / "file", "--workers", 0)
    assert_refused(done, [str(bad / "file")])
    assert (bad / "file").read_text() == "in the way"


MINE_REFUSALS = {
    "missing data": (["--data", "{bad}/nowhere"], ["--data", "nowhere"]),
    "empty data": (["--data", "{bad}/empty"], ["--data", "empty"]),
    "k is all": (["--k", "40"], ["--k 40", "40 images", "39"]),
    "unknown arch": (["--arch", "resnet81"], ["--arch resnet81", "resnet18"]),
    "another arch": (["--arch", "resnet18"], ["teacher.pth", "resnet18", TEACHER]),
    "other stem": (["--stem", "imagenet"], ["teacher.pth", "stem"]),
    "not a checkpoint": (["--weights", "{bad}/html.pth"], ["--weights", "html.pth", "web page"]),
    "wrong key": (["--checkpoint_key", "ema"], ["--checkpoint-key ema", "state_dict"]),
    "untrained what": (["--weights", "untrained"], ["--arch"]),
}


@pytest.mark.parametrize("case", MINE_REFUSALS)
def test_mine_refuses(case, tree, bad, teacher, tmp_path):
    changed, words = MINE_REFUSALS[case]
    done = in_this_process("compute_knn.py", "mine", "--data", tree / "train", "--weights", teacher, "--output",
                           tmp_path / "out", "--k", 5, "--workers", 0, "--device", "cpu",
                           *[word.format(bad=bad) for word in changed])
    assert_refused(done, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changed", "words"), [
    (["--data", "{tree}/train"], ["--data", "val/"]),
    (["--k", "41"], ["--k 41", "40 training images"]),
    (["--data", "{bad}/flat"], ["--data", "labels"]),
])
def test_eval_refuses(changed, words, tree, bad, teacher):
    done = in_this_process("compute_knn.py", "eval", "--data", tree, "--weights", teacher, "--k", 5, "--workers", 0,
                           "--device", "cpu", "--features", "none",
                           *[word.format(bad=bad, tree=tree) for word in changed])
    assert_refused(done, words)


@pytest.mark.parametrize(("changed", "words"), [
    (["--data", "{bad}/nowhere"], ["--data", "nowhere"]),
    (["--arch", "resnet81"], ["--arch resnet81", "resnet18"]),
    (["-b", "41"], ["--batch-size 41"]),
])
def test_train_teacher_refuses(changed, words, tree, bad, tmp_path):
    done = in_this_process("train_teacher.py", "--data", tree / "train", "--arch", TEACHER, "-b", 10, "--moco-k", 16,
                           "--output", tmp_path / "out", *COMMON, *[word.format(bad=bad) for word in changed])
    assert_refused(done, words)
    assert not (tmp_path / "out").exists()
