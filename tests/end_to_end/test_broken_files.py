"""Images that cannot be opened and numbers that are not finite, in training and mining."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.experiment import COMMON, STUDENT
from helpers.images import render_flat
from helpers.runs import load
from helpers.scripts import assert_refused, in_this_process, well


@pytest.fixture
def with_a_broken_image(tmp_path):
    folder = render_flat(tmp_path / "flat")
    (folder / "5.jpg").write_bytes((folder / "5.jpg").read_bytes()[:200])
    return folder


def random_flags(data, teacher, output):
    return ["--data", data, "-a", STUDENT, "--distill", teacher, "--sampler", "random", "-b", 6, "--epochs", 1,
            "--output", output, *COMMON]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_stops_the_run_by_name(with_a_broken_image, teacher, tmp_path, workers):
    done = in_this_process("train_distill.py", *random_flags(with_a_broken_image, teacher, tmp_path / "out"),
                           "--workers", workers)
    assert_refused(done, [str(with_a_broken_image / "5.jpg"), "--on-bad-image skip"])
    assert not (tmp_path / "out" / "student.pth").exists()


def test_a_broken_image_is_skipped_and_counted(with_a_broken_image, teacher, tmp_path):
    well(in_this_process("train_distill.py", *random_flags(with_a_broken_image, teacher, tmp_path / "out"),
                         "--on-bad-image", "skip"))
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "images that could not be opened: 1, replaced by others 1 times" in log
    assert str(with_a_broken_image / "5.jpg") in log
    assert (tmp_path / "out" / "student.pth").exists()


def test_mining_over_a_broken_image(with_a_broken_image, teacher, tmp_path):
    flags = ["mine", "--data", with_a_broken_image, "--weights", teacher, "--output", tmp_path / "nn", "--k", 3,
             "--workers", 0, "--device", "cpu"]
    assert_refused(in_this_process("compute_knn.py", *flags), [str(with_a_broken_image / "5.jpg")])
    assert not (tmp_path / "nn").exists()
    for _ in range(2):  # the second time from kept features
        done = well(in_this_process("compute_knn.py", *flags, "--on-bad-image", "skip"))
        assert f"1 of 12 images could not be opened and are left out: {with_a_broken_image / '5.jpg'}" in done.out
        assert "3 nearest of 11 images" in done.out
    found = np.load(tmp_path / "nn" / "closek_info.npy")
    assert (found.shape, found.dtype) == ((12, 3), np.int64)
    gone = [path.name for path in sorted(with_a_broken_image.iterdir())].index("5.jpg")
    assert (found[gone] == -1).all()
    well(in_this_process("compute_knn.py", "check", tmp_path / "nn" / "closek_info.npy", "--data", with_a_broken_image))
    # Oracle: the neighbours in the folder without that image.
    shutil.copytree(with_a_broken_image, tmp_path / "others", ignore=lambda *_: ["5.jpg"])
    well(in_this_process("compute_knn.py", "mine", "--data", tmp_path / "others", *flags[3:6], tmp_path / "nn2",
                         *flags[7:]))
    kept = np.delete(np.arange(12), gone)
    assert (found[kept] == kept[np.load(tmp_path / "nn2" / "closek_info.npy")]).all()


def test_features_are_those_of_the_files_as_they_are(with_a_broken_image, teacher, tmp_path):
    """Put back under its name, an image that could not be opened has its own neighbours; so has a changed one."""
    def mined(data, folder):
        done = well(in_this_process("compute_knn.py", "mine", "--data", data, "--weights", teacher, "--output",
                                    tmp_path / folder, "--k", 3, "--workers", 0, "--device", "cpu", "--on-bad-image",
                                    "skip", "--features", tmp_path / "features"))
        return np.load(tmp_path / folder / "closek_info.npy"), done.out

    data = shutil.copytree(with_a_broken_image, tmp_path / "data")
    mined(data, "nn")
    for source in ("3.jpg", "7.jpg"):  # the same name, and then the same size too
        (data / "5.jpg").write_bytes((data / source).read_bytes())
        found, said = mined(data, "nn")
        assert "could not be opened" not in said
        fresh, _ = mined(shutil.copytree(data, tmp_path / source), f"nn-{source}")
        assert (found == fresh).all()


@pytest.mark.parametrize("sampler", ["cf", "cluster", "cluster+cf"])
def test_training_leaves_out_what_mining_left_out(sampler, with_a_broken_image, teacher, tmp_path):
    flags = ["--data", with_a_broken_image, "--weights", teacher, "--output", tmp_path / "nn", "--workers", 0,
             "--device", "cpu", "--on-bad-image", "skip"]
    well(in_this_process("compute_knn.py", "mine", *flags, "--k", 3, "--far"))
    well(in_this_process("compute_knn.py", "cluster", *flags, "--num-clusters", 2))
    said = well(in_this_process("compute_knn.py", "check", tmp_path / "nn" / "clusters_2.pth", "--data",
                                with_a_broken_image)).out
    assert f"1 images could not be opened when it was made, {with_a_broken_image / '5.jpg'} first; training" in said
    sets = ["--sampler", sampler, "--closek-info", tmp_path / "nn" / "closek_info.npy", "--fark-info",
            tmp_path / "nn" / "fark_info.npy", "--cluster-info", tmp_path / "nn" / "clusters_2.pth", "--nearest-k", 2,
            "--total-k", 3, "--epochs", 3, "--batch-size", 2]
    well(in_this_process("train_distill.py", *random_flags(with_a_broken_image, teacher, tmp_path / "out"), *sets))
    log = (tmp_path / "out" / "log.txt").read_text()  # --on-bad-image error: it was never asked for
    assert "1 images that could not be opened when" in log
    assert " of 11 different ones" in log


def assert_stopped(done, output, step):
    assert done.rc == 3, done.err
    assert done.err.count("\n") == 1
    assert done.err.startswith("error: the loss is not finite")
    found = json.loads((output / "nonfinite.json").read_text())
    assert (found["epoch"], found["step"]) == (1, step + 1)
    assert "loss" in found["parts"]
    return found["indices"]


def test_a_learning_rate_that_explodes_stops_the_run(teacher, tmp_path):
    output = tmp_path / "out"
    flags = random_flags(render_flat(tmp_path / "flat"), teacher, output)
    done = in_this_process("train_distill.py", *flags, "--lr", "1e30")
    indices = assert_stopped(done, output, 1)
    assert len(set(indices)) == 6
    assert set(indices) < set(range(12))
    assert not (output / "student.pth").exists()


def test_a_teacher_with_infinite_weights_is_refused(teacher, tmp_path):
    saved = load(teacher)
    saved.pop("checksum")
    saved["state_dict"]["module.encoder_q.conv5.1.bias"].fill_(float("inf"))
    torch.save(saved, tmp_path / "inf.pth")
    words = ["encoder_q.conv5.1.bias holds 1,024 NaN or infinite numbers"]
    data, weights = render_flat(tmp_path / "flat"), tmp_path / "inf.pth"
    assert_refused(in_this_process("train_distill.py", *random_flags(data, weights, tmp_path / "out")), words)
    assert_refused(in_this_process("compute_knn.py", "mine", "--data", data, "--weights", weights, "--output",
                                   tmp_path / "nn", "--k", 3, "--workers", 0, "--device", "cpu"), words)
    assert not (tmp_path / "nn").exists()
