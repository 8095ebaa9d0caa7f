"""Images of one class: every score is 100 %, and a sentence says that it means nothing."""

import shutil

import pytest
from helpers.scripts import in_this_process, well

SAID = "all images are of one class (across), so these scores mean nothing"


@pytest.mark.parametrize("line", [["evaluate.py", "knn", "--k", 3], ["compute_knn.py", "eval", "--k", 3],
                                  ["evaluate.py", "linear", "--cached", "--iterations", 2]])
def test_scores_of_one_class_mean_nothing(line, tree, weights, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(tree / split / "across", tmp_path / "one" / split / "across")
    output = ["--output", tmp_path / "out"] if line[0] == "evaluate.py" else []
    for data, said in ((tmp_path / "one", 1), (tree, 0)):
        done = well(in_this_process(*line, "--data", data, "--weights", weights, "--device", "cpu", "--workers", 0,
                                    *output))
        assert done.out.count(SAID) == said, done.out
        assert ("100.00" in done.out) >= bool(said)
