"""What a run's folder may hold before the run writes there: whatever it does not know as its own stays as it is."""

import json
import os

import pytest
import torch

from runtime.errors import UserError
from runtime.folder import refuse_inputs, refuse_other_run
from runtime.store import Checkpoints, save_checkpoint

CONFIG = {"lr": 0.1, "epochs": 5, "distill": None, "data": "images"}
OTHER = {**CONFIG, "lr": 0.2}
EXPORTS = ["student.pth"]


def checkpoint(folder, config=CONFIG):
    folder.mkdir(exist_ok=True)
    Checkpoints(folder, 2).save({"epoch": 1, "step": 0, "steps": 10, "skipped": 0, "random": [], "config": config})


def export(folder, config=CONFIG, epoch=1):
    save_checkpoint({"epoch": epoch, "steps": 10, "config": config, "state_dict": {}}, folder / "student.pth")


def settings(folder, config=CONFIG):
    (folder / "config.json").write_text(json.dumps(config))


def check(folder):
    refuse_other_run(folder, CONFIG, {"output"}, EXPORTS, ["student_trunk.pth"])


def refusal(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError) as caught:
        check(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert f"--output {folder}" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("make", [[], [checkpoint], [checkpoint, settings, export], [settings], [export],
                                  [settings, export]])
def test_an_empty_folder_and_this_very_run_are_taken(tmp_path, make):
    (tmp_path / "notes.txt").write_text("of the user")
    (tmp_path / "nn").mkdir()
    for each in make:
        each(tmp_path)
    check(tmp_path)


def test_a_folder_that_is_not_there_is_taken(tmp_path):
    check(tmp_path / "new")


@pytest.mark.parametrize("make", [[settings], [export], [checkpoint], [checkpoint, settings], [settings, export]])
def test_another_run_is_refused_whatever_is_left_of_it(tmp_path, make):
    for each in make:
        each(tmp_path, OTHER)
    assert "lr was 0.2, now 0.1" in refusal(tmp_path)


def test_the_settings_that_the_checkpoint_records_stand_for_a_config_that_was_deleted(tmp_path):
    checkpoint(tmp_path, OTHER)
    export(tmp_path, CONFIG)
    assert "lr was 0.2, now 0.1" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"MoCo's own", None])
def test_a_file_of_someone_else_under_the_name_of_a_result_is_refused(tmp_path, content):
    if content is None:
        torch.save({"state_dict": {"w": torch.zeros(2)}, "epoch": 200}, tmp_path / "student.pth")
    else:
        (tmp_path / "student.pth").write_bytes(content)
    assert "holds student.pth, which no such run wrote" in refusal(tmp_path)
    settings(tmp_path)
    assert "holds student.pth, which no such run wrote" in refusal(tmp_path)


def test_a_finished_run_whose_checkpoints_were_deleted_is_not_wiped_by_its_own_command(tmp_path):
    settings(tmp_path)
    export(tmp_path, epoch=5)
    assert "this run's student.pth after 5 epochs but no checkpoint" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt", "student_trunk.pth"])
def test_a_log_of_unknown_origin_is_refused(tmp_path, name):
    (tmp_path / name).write_text("of the user\n")
    assert f"holds {name} but no config.json" in refusal(tmp_path)
    settings(tmp_path)
    check(tmp_path)


@pytest.mark.parametrize("way", ["itself", "symbolic link", "hard link", "in a list"])
@pytest.mark.parametrize("name", ["student.pth", "checkpoint.pth", "log.txt"])
def test_an_input_that_would_be_overwritten_is_refused(tmp_path, name, way):
    path = tmp_path / name
    path.write_bytes(b"the teacher")
    given = path if way in ("itself", "in a list") else tmp_path / "other.name"
    if way == "symbolic link":
        given.symlink_to(path)
    elif way == "hard link":
        os.link(path, given)
    value = ["x", str(given)] if way == "in a list" else str(given)
    with pytest.raises(UserError, match=f"--distill {given} is the file {name} that this run would write"):
        refuse_inputs(tmp_path, {**CONFIG, "distill": value}, EXPORTS, {"distill": "--distill"})
    refuse_inputs(tmp_path / "elsewhere", {**CONFIG, "distill": value}, EXPORTS, {"distill": "--distill"})
    refuse_inputs(tmp_path, {**CONFIG, "resume": str(path), "output": str(tmp_path)}, EXPORTS, {})
