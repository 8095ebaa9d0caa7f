"""The experiment of helpers/experiment.py: what it leaves, the same again, interrupted, finished."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers.experiment import STUDENT, TEACHER
from helpers.runs import assert_same_student, load, metrics
from helpers.scripts import in_this_process, script, well


def test_teacher_run_leaves_mocos_layout(teacher_run):
    folder = teacher_run
    saved = load(folder / "teacher.pth")
    trunk = {k for k in torchvision.models.get_model(TEACHER).state_dict() if not k.startswith("fc.")}
    head = {f"fc.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert set(saved["state_dict"]) == {f"module.encoder_q.{key}" for key in trunk | head}
    assert (saved["arch"], saved["stem"], saved["image_size"]) == (TEACHER, "cifar", 32)
    assert {path.name.partition(".tfevents")[0] for path in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "log.txt", "checkpoint.pth", "checkpoint-000000004.pth", "teacher.pth",
        "events.out"}
    assert [line["step"] for line in metrics(folder)] == list(range(1, 9))
    assert load(folder / "checkpoint.pth")["loss"]["queue.items"].shape == (16, 128)


def test_what_a_run_leaves(run, teacher, neighbours):
    assert {path.name.partition(".tfevents")[0] for path in run.iterdir()} == {
        "config.json", "metrics.jsonl", "log.txt", "checkpoint.pth", "checkpoint-000000010.pth", "student.pth",
        "student_trunk.pth", "events.out"}
    config = json.loads((run / "config.json").read_text())
    assert config["student_arch"] == STUDENT
    assert config["losses"]["coss"] == {"l_0": 1.0, "l_1": 1.0, "s_temp": 0.1, "t_temp": 0.07, "space_batch": "local"}
    assert not {name for name, value in config.items() if value is None} & {
        "l_0", "s_temp", "disco_weight", "mean", "std", "branch", "warmup_epochs", "image_size", "feature"}
    start, = config["starts"]
    assert (start["torch"], start["command"].split()[0][-16:]) == (torch.__version__, "train_distill.py")
    assert config["teacher_sha256"] == hashlib.sha256(teacher.read_bytes()).hexdigest()
    drawn_from = np.load(neighbours)[:, :6].astype("<i8")
    assert config["closek_info_fingerprint"] == hashlib.sha256(drawn_from.tobytes()).hexdigest()
    lines = metrics(run)
    assert [(line["step"], line["epoch"]) for line in lines] == [(5, 1), (10, 1), (15, 2), (20, 2)]
    for line in lines:
        assert {"loss", "row", "space", "lr", "images_per_second", "data_wait", "student_norm", "dim_correlation",
                } <= set(line)
        assert line["loss"] == pytest.approx(line["row"] + line["space"], rel=1e-4)
        assert line["lr"] == 0.001  # the original's warm-up holds the base rate for five epochs
        assert 0 <= line["data_wait"] <= 1
    assert lines[-1]["loss"] < lines[0]["loss"]
    scores = metrics(run, "knn")
    assert [line["step"] for line in scores] == [10, 20]
    assert all(0 <= line["top1"] <= 100 for line in scores)
    log = (run / "log.txt").read_text()
    assert hashlib.sha256(teacher.read_bytes()).hexdigest()[:16] in log
    assert "MoCo layout" in log


def test_the_end_of_a_run_says_how_its_student_is_loaded_and_evaluated(run):
    """The line for torchvision alone is run; the trunk's file is the student's trunk, and nothing else."""
    said = (run / "log.txt").read_text().partition(f"done: {run}\n")[2].splitlines()
    lines = [line.partition("    ")[2].strip() for line in said if "    " in line]
    loaded, in_python, *commands = lines
    names = {}
    exec(loaded, names)
    trunk = {k.removeprefix("backbone."): v for k, v in load(run / "student.pth")["state_dict"].items() if
             k.startswith("backbone.")}
    found = names["model"].state_dict()
    assert trunk.keys() == found.keys() and all(torch.equal(trunk[k], found[k]) for k in trunk)
    assert in_python == f"import coss; rows = coss.load('{run}/student.pth').embed('photos/')"
    assert [line.split()[:3] for line in commands] == [["python", "compute_knn.py", "eval"],
                                                       ["python", "evaluate.py", "overlap"]]
    data = commands[0].split()[commands[0].split().index("--data") + 1]
    assert {path.name for path in Path(data).iterdir()} == {"train", "val"}  # not train/, where nothing can be scored


def test_tensorboard_events_hold_the_metrics(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    curve = events.Scalars("train/loss")
    assert [event.step for event in curve] == [5, 10, 15, 20]
    assert [event.value for event in curve] == pytest.approx([line["loss"] for line in metrics(run)], rel=1e-6)
    assert "knn/top1" in events.Tags()["scalars"]


def test_the_student_file(run):
    saved = load(run / "student.pth")
    full = torchvision.models.get_model(STUDENT).state_dict()
    trunk = {f"backbone.{k}" for k in full if not k.startswith("classifier.")}
    head = {f"proj_head.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert set(saved["state_dict"]) == trunk | head
    assert saved["state_dict"]["proj_head.0.weight"].shape == (2048, 512)
    assert saved["state_dict"]["proj_head.2.weight"].shape == (1024, 2048)
    assert (saved["arch"], saved["stem"], saved["image_size"]) == (STUDENT, "imagenet", 32)
    assert saved["teacher"]["arch"] == TEACHER
    resume = load(run / "checkpoint.pth")
    assert {"state_dict", "updater", "random", "config", "epoch", "steps"} <= set(resume)
    assert (resume["epoch"], resume["steps"]) == (2, 20)
    for key, value in saved["state_dict"].items():
        assert torch.equal(value, resume["state_dict"][key])


def test_the_same_command_again_gives_the_same_student(run, distil_flags, tmp_path):
    well(script("train_distill.py", *distil_flags, "--output", tmp_path / "again", "--workers", 1, "--knn-every", 1))
    assert_same_student(run, tmp_path / "again")
    changing = {"images_per_second", "data_wait"}
    strip = [[{k: v for k, v in line.items() if k not in changing} for line in metrics(folder)]
             for folder in (run, tmp_path / "again")]
    assert strip[0] == strip[1]


def test_an_interrupted_run_goes_on_to_the_same_student(run, distil_flags, tmp_path, monkeypatch):
    """Cut short in the middle of its second epoch, started again: to the bit what the straight run gives.

    Without workers and k-NN scores, which must make no difference either.
    """
    from runtime.loop import Trainer

    output, whole_epoch = tmp_path / "cut", Trainer.epoch

    def interrupted(self, epoch, step_of):
        if epoch == 0:
            return whole_epoch(self, epoch, step_of)
        left = [4]

        def step(batch):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return step_of(batch)

        return whole_epoch(self, epoch, step)

    flags = [*distil_flags, "--output", output, "--workers", 0, "-p", 2]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "epoch", interrupted)
        assert in_this_process("train_distill.py", *flags).rc == 130
    assert load(output / "checkpoint.pth")["epoch"] == 1
    assert [line["step"] for line in metrics(output)] == [2, 4, 6, 8, 10, 12, 14]
    flags = [*distil_flags, "--output", output, "--workers", 0, "-p", 5]
    done = well(script("train_distill.py", *flags))
    assert "resuming from" in done.out
    assert [line["step"] for line in metrics(output)] == [2, 4, 6, 8, 10, 15, 20]
    assert_same_student(run, output)
    one, two = load(run / "checkpoint.pth")["updater"], load(output / "checkpoint.pth")["updater"]
    for key, state in one["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], two["optimizer"]["state"][key]["momentum_buffer"])


def test_a_finished_run_started_again_is_left_as_it_is(run, distil_flags, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    before = (copy / "student.pth").read_bytes()
    well(in_this_process("train_distill.py", *distil_flags, "--output", copy, "--workers", 0, "--knn-every", 1))
    assert (copy / "student.pth").read_bytes() == before
    assert [line["step"] for line in metrics(copy)] == [5, 10, 15, 20]
