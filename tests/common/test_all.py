"""evaluate.py all: what is run and left out, one table, and two beside one another."""

import json

import pytest
from helpers.scripts import assert_refused, in_this_process, well


@pytest.fixture(scope="module")
def everything(tree, weights, tmp_path_factory):
    """Without --root, with a --davis that is not there: (folder, what was printed)."""
    output = tmp_path_factory.mktemp("all")
    line = ["all", "--data", tree, "--weights", weights, "--teacher", weights, "--output", output, "--device", "cpu",
            "--workers", 0, "--ood", f"again={tree / 'val'}", "--davis", tree, "--skip", "retrieval"]
    return output, in_this_process("evaluate.py", *line)


def test_what_is_given_is_run_and_the_rest_is_named(everything):
    output, done = everything
    record = json.loads((output / "all.json").read_text())
    assert list(record["evaluations"]) == ["knn", "linear", "robustness", "overlap"]
    assert done.rc == 2  # the videos are not there
    assert record["failed"].keys() == {"video"}
    assert "video: failed, --data" in done.out
    assert record["left_out"] == {
        "finetune": "it needs --labels", "transfer": "it needs --root", "retrieval": "--skip retrieval",
        "retrieval, landmarks": "--skip retrieval"}
    assert "Traceback" not in done.err


def test_the_table_is_the_evaluations_own_numbers(everything):
    output, _ = everything
    evaluations = json.loads((output / "all.json").read_text())["evaluations"]
    rows = [line.strip("| ").split(" | ") for line in (output / "all.md").read_text().splitlines()[2:]]
    found = {(row[0], row[1].strip(), row[2]): row[3] for row in rows}
    assert found["linear", "", "top1"] == f"{evaluations['linear']['metrics']['top1']:.2f}"
    assert found["knn", "k=10 T=0.07", "top1"] == f"{evaluations['knn']['metrics']['k=10 T=0.07']['top1']:.2f}"
    again = evaluations["robustness"]["metrics"]["sets"]
    assert again["again"]["top1"] == pytest.approx(again["test"]["top1"])
    student, = {row[1] for row in rows if row[0] == "overlap"}
    assert student.startswith("weights")  # the folder of student.pth, as in every table
    assert found["overlap", student, "k=1"] == "100.00"  # with itself


def test_knn_is_compute_knns(everything, tree, weights):
    line = ["eval", "--data", tree, "--weights", weights, "--device", "cpu", "--workers", 0, "--features", "none",
            "--json", "--k", 10]
    score, = json.loads(well(in_this_process("compute_knn.py", *line)).out)["knn"]
    metrics = json.loads((everything[0] / "all.json").read_text())["evaluations"]["knn"]["metrics"]["k=10 T=0.07"]
    assert metrics == {"top1": score["top1"], "top5": score["top5"]}


def test_compare(everything, tmp_path):
    output, _ = everything
    record = json.loads((output / "all.json").read_text())
    record["evaluations"]["linear"]["table"][0]["top1"] += 1.5
    (tmp_path / "b.json").write_text(json.dumps(record))
    done = well(in_this_process("evaluate.py", "all", "--compare", output / "all.json", tmp_path / "b.json", "--json"))
    rows = json.loads(done.out)["rows"]
    moved = [row for row in rows if row["B - A"]]
    assert [(row["evaluation"], row["metric"], round(row["B - A"], 6)) for row in moved] == [("linear", "top1", 1.5)]
    assert "A: " in done.err
    done = well(in_this_process("evaluate.py", "all", "--compare", output / "results.jsonl", output / "all.json"))
    assert "other" not in done.out  # the same lines


def test_a_bad_flag_of_a_later_evaluation_is_said_before_the_first_begins(tree, weights, tmp_path):
    done = in_this_process("evaluate.py", "all", "--data", tree, "--weights", weights, "--output", tmp_path, "--device",
                           "cpu", "--workers", 0, "--ood", "sketch")
    assert (done.rc, done.out, list(tmp_path.iterdir())) == (2, "", [])
    assert done.err == ("error: argument --ood: 'sketch' is not NAME=DIR, such as sketch=/data/imagenet-sketch; "
                        "evaluate.py robustness --help all lists every flag\n")


@pytest.mark.parametrize(("flags", "words"), [
    ([], "needs --weights FILE, or --compare"), (["--compare", "a", "b"], "--compare a could not be read"),
    (["--weights", "w.pth", "--skip", "flying"], "--skip flying is not an evaluation")])
def test_bad_input_is_one_sentence(flags, words, tmp_path):
    done = in_this_process("evaluate.py", "all", "--output", tmp_path, "--device", "cpu", *flags)
    assert (done.rc, done.err.count("\n")) == (2, 1)
    assert words in done.err


@pytest.mark.parametrize("root", ["none", "all.md"])
def test_a_root_that_is_not_a_folder(everything, weights, root):
    output, _ = everything
    done = in_this_process("evaluate.py", "all", "--weights", weights, "--root", output / root, "--device", "cpu")
    assert_refused(done, [f"--root {output / root} is not a folder"])
