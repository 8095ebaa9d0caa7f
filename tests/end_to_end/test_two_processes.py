"""One process and two: the same first step, one run, the same neighbours and scores."""

import json
import platform
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import small  # noqa: F401 - the ranks know the networks too
from helpers.experiment import COMMON, STUDENT
from helpers.ranks import on_ranks
from helpers.runs import load, metrics
from helpers.scripts import in_this_process, script, well

import train_distill
from runtime.device import Process
from runtime.errors import UserError


@pytest.fixture(scope="session")
def first_steps(work, tree, teacher, neighbours):
    """One step with the row term alone, by one and by two processes: {(sampler, processes): folder}."""
    folders = {}
    for sampler in ("random", "cf"):
        for processes in (0, 2):
            folder = folders[sampler, processes] = work / f"step-{sampler}-{processes}"
            well(script("train_distill.py", "--data", tree / "train", "-a", STUDENT, "--distill", teacher, "--sampler",
                        sampler, "--closek-info", neighbours, "--nearest-k", 1, "--total-k", 3, "-b", 40, "--epochs",
                        1, "-p", 1, "--l_1", 0, "--wd", 0, "--output", folder, *COMMON, processes=processes))
    return folders


@pytest.mark.parametrize("sampler", ["random", "cf"])
def test_two_processes_take_the_same_first_step_as_one(first_steps, sampler):
    """The row term is a mean over rows, and the student has no batch norm: nothing may depend on the processes."""
    one, two = (metrics(first_steps[sampler, processes]) for processes in (0, 2))
    assert len(one) == len(two) == 1
    assert one[0]["row"] == pytest.approx(two[0]["row"], rel=1e-5)
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-5)
    assert one[0]["space"] != pytest.approx(two[0]["space"], rel=1e-4)  # over each process's own batch: it may differ
    # With no weight decay the momentum buffer after one step is the gradient itself.
    gradients = [[state["momentum_buffer"] for _, state in sorted(load(
        first_steps[sampler, processes] / "checkpoint.pth")["updater"]["optimizer"]["state"].items())]
        for processes in (0, 2)]
    assert len(gradients[0]) == len(gradients[1]) == 18
    for a, b in zip(*gradients, strict=True):
        assert a.norm() > 0
        assert (a - b).norm() <= 1e-4 * a.norm()
    states = [load(first_steps[sampler, processes] / "student.pth")["state_dict"] for processes in (0, 2)]
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-4, atol=1e-5)


def test_two_processes_train_and_leave_one_run(distil_flags, work):
    folder = work / "two"
    done = well(script("train_distill.py", *distil_flags, "--output", folder, "--workers", 1, "--knn-every", 2,
                       "--distributed", processes=2))
    assert "2 x cpu" in done.out
    assert "--distributed" in done.out  # accepted, ignored, with a word
    assert {path.name.partition(".tfevents")[0] for path in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "log.txt", "checkpoint.pth", "checkpoint-000000010.pth", "student.pth",
        "student_trunk.pth", "events.out"}
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [5, 10, 15, 20]  # -b counts anchors over all processes
    assert lines[-1]["loss"] < lines[0]["loss"]
    saved = load(folder / "checkpoint.pth")
    assert len(saved["random"]) == 2
    assert not torch.equal(saved["random"][0]["torch"], saved["random"][1]["torch"])
    assert not any(key.startswith("module.") for key in saved["state_dict"])


def test_two_processes_mine_and_score_what_one_does(tree, teacher, neighbours, tmp_path):
    flags = ["--weights", teacher, "--workers", 0, "--device", "cpu", "--features", tmp_path / "features"]
    well(script("compute_knn.py", "mine", "--data", tree / "train", "--output", tmp_path, "--k", 12, "--far", *flags,
                processes=2))
    for name in ("closek_info", "fark_info"):
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), np.load(neighbours.with_stem(name)))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".json", ".json", ".npy", ".npy"]
    one, = (tmp_path / "features").glob("*.npy")
    np.testing.assert_allclose(np.load(one), np.load(neighbours.parent / "features" / one.name), rtol=1e-4, atol=1e-6)
    two = well(script("compute_knn.py", "eval", "--data", tree, "--k", 5, "--json", *flags,
                       processes=2))
    alone = well(in_this_process("compute_knn.py", "eval", "--data", tree, "--k", 5, "--json", *flags))
    assert json.loads(two.out)["knn"] == json.loads(alone.out)["knn"]


def test_a_batch_that_does_not_divide_among_the_processes(distil_flags, tmp_path):
    done = script("train_distill.py", *distil_flags, "-b", 5, "--output", tmp_path / "out", "--workers", 0,
                  processes=2)
    assert done.rc != 0
    said = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert said == ["error: --batch-size 5 cannot be divided evenly among 2 processes; give 4 or 6"]
    assert not (tmp_path / "out").exists()


def distil(rank, lines):
    """What a rank is told that starts each of the ``lines``, one for each rank, which all end before a step."""
    process = Process(rank, 2, torch.device("cpu"), dist.new_group(backend="gloo"))
    said = []
    for line in lines:
        with pytest.raises(UserError) as caught, process.closing:
            train_distill.distil(train_distill.parse_args(line[rank]), process)
        said.append((caught.value.exit_code, str(caught.value)))
    return said


def test_what_one_process_alone_has_is_refused_on_both(distil_flags, neighbours, tree, tmp_path):
    """Other neighbours, other scored images, and no images at all on the second machine."""
    (tmp_path / "meet").mkdir()
    np.save(tmp_path / "other.npy", np.load(neighbours)[:, ::-1])
    shutil.copytree(tree, tmp_path / "tree")
    picture = next((tmp_path / "tree" / "val").rglob("*.jpg"))
    picture.rename(picture.with_stem("zz"))
    line = [*map(str, distil_flags), "--workers=0", "--output", str(tmp_path / "out"), "--knn-every=1", "--knn-data",
            str(tree)]
    others = [["--closek-info", tmp_path / "other.npy"], ["--knn-data", tmp_path / "tree"],
              ["--data", tmp_path / "none"]]
    first, second = on_ranks(2, distil, tmp_path / "meet", [[line, [*line, *map(str, more)]] for more in others])
    assert first == second
    assert [code for code, _ in first] == [2, 2, 2]
    near, scored, missing = (words for _, words in first)
    assert near.startswith("closek_info_fingerprint: rank 0 has ")
    assert scored.startswith("the fingerprint of --knn-data's test images: rank 0 has ")
    assert missing.startswith(f"rank 1 on {platform.node()}: --data {tmp_path / 'none'} was not found")
    assert not (tmp_path / "out").exists()
