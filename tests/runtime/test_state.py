"""Files appear whole or not at all; random states come back; a folder is known to hold this run or another."""

import json
import random

import numpy as np
import pytest
import torch

from runtime.errors import UserError
from runtime.state import (
    VOLATILE,
    find_resume,
    load_checkpoint,
    random_state,
    save_checkpoint,
    save_json,
    set_random_state,
    write_atomic,
)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_atomic_makes_folders_and_leaves_only_the_file(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    assert write_atomic(path, lambda file: file.write(b"whole") and None) == path
    assert path.read_bytes() == b"whole"
    assert files(path.parent) == ["file.bin"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("odd")])
def test_a_failed_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"ne")
        raise error

    with pytest.raises(UserError if isinstance(error, OSError) else type(error)) as caught:
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["file.bin"]
    if isinstance(error, OSError):
        assert str(path) in str(caught.value)
        assert "No space left on device" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_reader_never_sees_half(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    seen = []

    def write(file):
        file.write(b"n" * 100_000)
        seen.append(path.read_bytes())

    write_atomic(path, write)
    assert seen == [b"old"]
    assert len(path.read_bytes()) == 100_000


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        save_json({}, tmp_path / "file" / "config.json")
    assert str(tmp_path / "file") in str(caught.value)


def test_json_and_checkpoints_come_back(tmp_path):
    save_json({"a": [1, 2.5, None, "x"]}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, 2.5, None, "x"]}
    state = {"epoch": 3, "steps": 7, "random": [], "state_dict": {"w": torch.randn(3)},
             "config": {"lr": 0.1, "schedule": [1, 2]}}
    save_checkpoint(state, tmp_path / "x.pth")
    for loaded in (load_checkpoint(tmp_path / "x.pth"), torch.load(tmp_path / "x.pth", weights_only=True)):
        assert loaded["epoch"] == 3
        assert torch.equal(loaded["state_dict"]["w"], state["state_dict"]["w"])


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(50)])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, content):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def draws():
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item(),
            torch.randn(3).tolist(), np.random.randint(1000), random.sample(range(100), 5)]


@pytest.mark.parametrize("through_a_file", [False, True])
def test_random_state_round_trip(tmp_path, through_a_file):
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    draws()
    np.random.randn()  # leaves a second normal number in store
    states = random_state()
    if through_a_file:
        save_checkpoint({"epoch": 0, "steps": 0, "random": states}, tmp_path / "x.pth")
        states = load_checkpoint(tmp_path / "x.pth")["random"]
    expected = draws()
    assert draws() != expected
    assert set_random_state(states, rank=0, world_size=1)
    assert draws() == expected


def test_random_state_of_another_number_of_processes_is_left_alone():
    states = random_state()
    torch.manual_seed(9)
    before = torch.get_rng_state()
    assert not set_random_state(states, rank=0, world_size=2)
    assert torch.equal(torch.get_rng_state(), before)
    states = states * 2
    states[1] = {**states[1], "torch": before.clone()}
    assert set_random_state(states, rank=0, world_size=2)
    assert not torch.equal(torch.get_rng_state(), before)
    assert set_random_state(states, rank=1, world_size=2)
    assert torch.equal(torch.get_rng_state(), before)


CONFIG = {"lr": 0.03, "epochs": 25, "schedule": [120, 160], "output": "run", "workers": 4, "knn_data": None}


def a_run(folder, config=CONFIG, checkpoint=True):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if checkpoint:
        save_checkpoint({"epoch": 1}, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"


def test_an_empty_or_absent_folder_is_a_fresh_start(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert find_resume(folder, "auto", CONFIG, VOLATILE) is None
        with pytest.raises(UserError, match="holds no checkpoint.pth"):
            find_resume(folder, "force", CONFIG, VOLATILE)


def test_this_very_run_goes_on(tmp_path):
    checkpoint = a_run(tmp_path)
    assert find_resume(tmp_path, "auto", CONFIG, VOLATILE) == checkpoint
    assert find_resume(tmp_path, "auto", {**CONFIG, "schedule": (120, 160)}, VOLATILE) == checkpoint


def test_before_its_first_checkpoint_it_starts(tmp_path):
    a_run(tmp_path, checkpoint=False)
    assert find_resume(tmp_path, "auto", CONFIG, VOLATILE) is None
    assert find_resume(tmp_path, "auto", {**CONFIG, "lr": 0.1}, VOLATILE) is None  # nothing is lost by starting


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 1}, {"epoch": 1, "steps": 2}])
def test_a_file_that_is_no_training_checkpoint_is_refused(tmp_path, content):
    save_checkpoint(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(("key", "value"), [("lr", 0.1), ("epochs", 26), ("schedule", [120]), ("new", 1)])
def test_a_different_run_is_refused(tmp_path, key, value):
    a_run(tmp_path)
    with pytest.raises(UserError) as caught:
        find_resume(tmp_path, "auto", {**CONFIG, key: value}, VOLATILE)
    text = str(caught.value)
    assert f"--output {tmp_path}" in text
    assert f"{key} was {CONFIG.get(key)!r}, now {value!r}" in text
    assert "--resume" in text
    assert "\n" not in text


@pytest.mark.parametrize("key", sorted(VOLATILE))
def test_how_the_work_is_done_makes_no_other_run(tmp_path, key):
    checkpoint = a_run(tmp_path)
    assert find_resume(tmp_path, "auto", {**CONFIG, key: "changed"}, VOLATILE) == checkpoint
    with pytest.raises(UserError):
        find_resume(tmp_path, "auto", {**CONFIG, key: "changed"}, VOLATILE - {key})


def test_what_decides_the_result_is_not_volatile():
    decisive = {"seed", "lr", "batch_size", "epochs", "loss", "l_0", "l_1", "nearest_k", "total_k", "sampler", "aug",
                "student_arch", "teacher_arch", "momentum", "weight_decay", "cos", "subset", "image_size"}
    assert not decisive & VOLATILE


def test_force_goes_on_with_changed_settings(tmp_path):
    checkpoint = a_run(tmp_path)
    assert find_resume(tmp_path, "force", {**CONFIG, "lr": 1.0}, VOLATILE) == checkpoint


def test_a_path_goes_on_from_there(tmp_path):
    other = a_run(tmp_path / "other")
    assert find_resume(tmp_path / "new", str(other), {**CONFIG, "lr": 1.0}, VOLATILE) == other
    missing = str(tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match="--resume .*nowhere.pth is not a file"):
        find_resume(tmp_path, missing, CONFIG, VOLATILE)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_an_unreadable_config_is_refused(tmp_path, content):
    a_run(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="config.json is not readable"):
        find_resume(tmp_path, "auto", CONFIG, VOLATILE)


@pytest.mark.parametrize("content", ["[]", "3", "null"])
def test_a_config_that_is_no_object_is_refused(tmp_path, content):
    a_run(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError):
        find_resume(tmp_path, "auto", CONFIG, VOLATILE)
