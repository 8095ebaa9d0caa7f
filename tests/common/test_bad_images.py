"""--on-bad-image skip: what cannot be opened is left out of the scores, counted, and remembered beside the features.

Oracle: the same tree without those files.
"""

import json
import shutil

import pytest
from test_end_to_end import in_this_process, well

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
        assert "--datasets takes all images of a benchmark" in done.err
