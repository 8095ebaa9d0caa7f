"""--on-bad-image skip: what cannot be opened is left out of the scores, counted, and remembered beside the features.

Oracle: the same tree without those files.
"""

import json
import shutil

import numpy as np
import pytest
from helpers.scripts import in_this_process, well
from PIL import Image

from common import evaluation
from evaluate import parse_args

BAD = ("train/across/train03.jpg", "val/down/val01.jpg")


@pytest.fixture(scope="module")
def trees(tree, tmp_path_factory):
    """Two copies: one whose files BAD hold no image, and one without them."""
    broken, without = (tmp_path_factory.mktemp(name) / "tree" for name in ("broken", "without"))
    for root in (broken, without):
        shutil.copytree(tree, root)
    for name in BAD:
        (broken / name).write_bytes(b"no image")
        (without / name).unlink()
    return broken, without


def evaluate(command, data, weights, output, *flags):
    line = ["--data", data, "--weights", weights, "--output", output, "--device", "cpu", "--workers", 0, "--json"]
    done = well(in_this_process("evaluate.py", command, *line, *flags))
    return json.loads(done.out), done.err


@pytest.mark.parametrize(("command", "flags"), [
    ("knn", ["--k", 5]), ("linear", ["--cached", "--iterations", 9]), ("linear", ["--epochs", 1, "--lr", 0.5]),
    ("transfer", []), ("retrieval", [])])
def test_a_score_is_that_of_the_images_that_can_be_opened(command, flags, trees, weights, tmp_path):
    broken, without = trees
    flags = [*flags, "--on-bad-image", "skip"]
    expected, _ = evaluate(command, without, weights, tmp_path / "without", *flags)
    for _ in range(2):  # the second time from kept features
        found, said = evaluate(command, broken, weights, tmp_path / "broken", *flags)
        if "--epochs" not in flags:  # a picture drawn in place of another is trained on with no label
            assert found["metrics"] == expected["metrics"]
        else:
            assert found["sources"]["test"]["fingerprint"] == expected["sources"]["test"]["fingerprint"]
        assert f"images could not be opened and are left out: {broken / BAD[1]}" in said
        counts = {role: source["left_out"] for role, source in found["sources"].items()}
        assert counts["queries" if command == "retrieval" else "test" if command != "transfer" else "tree test"] == 1
    assert not any(source["left_out"] for source in expected["sources"].values())


def test_robustness(trees, weights, tmp_path):
    found, expected = (evaluate("robustness", root, weights, tmp_path / root.parent.name, "--iterations", 9, "--ood",
                                f"again={root / 'val'}", "--on-bad-image", "skip")[0] for root in trees)
    assert found["metrics"] == expected["metrics"]
    assert [found["metrics"]["sets"][name]["images"] for name in ("test", "again")] == [11, 11]
    assert found["sources"]["test"]["left_out"] == 1


def test_overlap_and_compute_knn(trees, weights, tmp_path):
    found, expected = (evaluate("overlap", root, weights, tmp_path / root.parent.name, "--teacher", weights,
                                "--on-bad-image", "skip")[0] for root in trees)
    assert found["metrics"] == expected["metrics"]
    assert found["sources"]["held-out"]["images"] == 11
    rows = [json.loads(well(in_this_process(
        "compute_knn.py", "eval", "--data", root, "--weights", weights, "--device", "cpu", "--workers", 0, "--k", 5,
        "--json", "--features", tmp_path / "features", "--on-bad-image", "skip")).out) for root in trees]
    assert rows[0]["knn"] == rows[1]["knn"]
    assert (rows[0]["train_images"], rows[0]["test_images"]) == (39, 11)


def test_finetune_counts_what_its_scores_leave_out(tree, trees, weights, tmp_path):
    flags = ["--labels", 0.5, "--epochs", 1, "--lr", 0.01, "--head-lr", 0.1, "--on-bad-image", "skip"]
    for number, root in enumerate(trees):
        shutil.copytree(tree / "train", tmp_path / f"{number}" / "train")
        shutil.copytree(root / "val", tmp_path / f"{number}" / "val")
    for _ in range(2):
        found, expected = (evaluate("finetune", tmp_path / root, weights, tmp_path / f"out{root}", *flags)[0]
                           for root in "01")
        assert found["metrics"]["last"] == {**expected["metrics"]["last"], "left_out": 1}


def test_a_benchmark_is_taken_whole(weights, tmp_path):
    for flags in (["--on-bad-image", "skip"], ["--subset", 0.5]):
        done = in_this_process("evaluate.py", "retrieval", "--root", tmp_path, "--datasets", "roxford5k", "--weights",
                               weights, "--output", tmp_path / "out", "--device", "cpu", *flags)
        assert (done.rc, done.err.count("\n")) == (2, 1)
        assert "--datasets needs all images of a benchmark" in done.err


@pytest.mark.parametrize("line", [
    ["evaluate.py", "knn"], ["evaluate.py", "linear", "--epochs", 1, "--lr", 1], ["compute_knn.py", "mine", "--k", 2],
    ["inspect_checkpoint.py"], ["pack_dataset.py"], ["pack_dataset.py", "--workers", 1],
    ["train_teacher.py", "-a", "resnet18"], ["export.py", "--to", "torchvision"]])
def test_the_most_pixels_of_an_image_are_everywhere_those_of_the_flag(line, tree, weights, tmp_path, monkeypatch):
    """Images of 32 x 32 pixels; 1024 are allowed, 1023 are not."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # what the scripts change is put back
    output, (script, *words) = tmp_path / "out", line
    flags = {"pack_dataset.py": ["--output", output], "export.py": ["--weights", weights, "--output", output],
             "inspect_checkpoint.py": [weights, "--device", "cpu"],
             "train_teacher.py": ["--output", output, "--device", "cpu", "--workers", 0, "--epochs", 1, "-b", 8,
                                  "--moco-k", 8]}.get(
        script, ["--weights", weights, "--output", output, "--device", "cpu", "--workers", 0])
    data = ["--data", tree if script == "evaluate.py" else tree / "train"]
    done = in_this_process(script, *words, *flags, *data, "--max-pixels", 1023)
    said = "its 1,024 pixels are more than --max-pixels 1023 allows; raise that if you trust the image"
    assert (done.rc, done.err.count(said)) == (2, 1), done
    if script not in ("train_teacher.py", "evaluate.py"):  # which would take long
        well(in_this_process(script, *words, *flags, *data, "--max-pixels", 1024))


def test_images_that_were_too_large_are_opened_once_they_are_allowed(tree, weights, tmp_path, monkeypatch):
    """What was left out for its size is not remembered as unreadable."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    large = root / "train/across/train03.jpg"
    Image.open(large).resize((40, 40)).save(large)
    found = [evaluate("knn", root, weights, tmp_path / "out", "--k", 5, "--on-bad-image", "skip", "--max-pixels",
                      most)[0]["sources"]["train"]["left_out"] for most in (1599, 1600, 1599)]
    assert found == [1, 0, 1]


def test_a_picture_of_neighbours_says_what_is_too_large(tree, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    data = ["--data", tree / "train", "--device", "cpu"]
    well(in_this_process("compute_knn.py", "mine", *data, "--weights", weights, "--output", tmp_path, "--k", 2,
                         "--workers", 0, "--features", "none"))
    for most in (1023, 1024):
        well(in_this_process("compute_knn.py", "check", tmp_path / "closek_info.npy", *data, "--max-pixels", most,
                             "--sheet", tmp_path / f"{most}.png"))
    monkeypatch.undo()  # the picture itself is larger
    without, shown = (np.asarray(Image.open(tmp_path / f"{most}.png")) for most in (1023, 1024))
    coloured = [(sheet[..., 0] != sheet[..., 1]).mean() for sheet in (without, shown)]
    assert coloured[0] == 0 < 0.1 < coloured[1]  # grey tiles with letters


@pytest.mark.parametrize(("policy", "same"), [("error", True), ("skip", False)])
def test_the_most_pixels_decide_a_result_only_where_images_are_left_out(policy, same):
    line = ["finetune", "--data", "d", "--weights", "w", "--labels", "0.1", "--on-bad-image", policy, "--max-pixels"]
    one, two = (evaluation.settings(parse_args([*line, most])) for most in ("1000", "2000"))
    assert (one == two) is same


def test_names_with_line_ends_and_codes_stay_on_their_line(trees, weights, tmp_path):
    root = tmp_path / "tree"
    shutil.copytree(trees[1], root)
    name = "a\nerror: b\x1b[31m.jpg"
    (root / "train/across" / name).write_bytes(b"no image")
    line = ["--weights", weights, "--device", "cpu", "--workers", 0, "--on-bad-image", "skip"]
    done = well(in_this_process("evaluate.py", "knn", "--data", root, "--output", tmp_path / "out", "--k", 5, *line))
    assert f"left out: {root}/train/across/a?error: b?[31m.jpg\n" in done.out
    assert "\nerror: b" not in done.out + done.err
    packed = well(in_this_process("pack_dataset.py", "--data", root / "train", "--output", tmp_path / "a.pack",
                                  "--on-bad-image", "skip", "--workers", 0))
    assert f"left out: {root}/train/across/a?error: b?[31m.jpg (" in packed.out
