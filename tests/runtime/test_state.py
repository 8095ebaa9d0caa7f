"""Files appear whole or not at all; random states come back; a folder is known to hold this run or another."""

import json
import os
import random

import numpy as np
import pytest
import torch

from runtime.errors import UserError
from runtime.state import check_same_run, random_state, save_json, set_random_state, write_atomic


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


def test_a_temporary_file_is_never_written_through_a_link(tmp_path):
    """Nor does one that a process with this number left behind stop the next."""
    other = tmp_path / "other"
    other.write_text("of someone else")
    temporary = tmp_path / f".x.json.{os.getpid()}.tmp"
    temporary.symlink_to(other)
    save_json({"a": 1}, tmp_path / "x.json")
    assert (other.read_text(), files(tmp_path)) == ("of someone else", ["other", "x.json"])
    temporary.write_text("left behind")
    save_json({"a": 2}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 2}
    (tmp_path / "x.json").unlink()
    (tmp_path / "x.json").symlink_to(other)
    save_json({"a": 3}, tmp_path / "x.json")
    assert (other.read_text(), (tmp_path / "x.json").is_symlink()) == ("of someone else", False)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/null")])
def test_only_regular_files_are_replaced(tmp_path, make):
    make(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"x.json could not be written \(a folder, a device or a pipe is there\)"):
        save_json({}, tmp_path / "x.json")
    assert (tmp_path / "x.json").exists()
    assert not (tmp_path / "x.json").is_file()


def test_json_comes_back(tmp_path):
    save_json({"a": [1, 2.5, None, "x"]}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, 2.5, None, "x"]}


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
    state = random_state()
    if through_a_file:
        torch.save(state, tmp_path / "x.pth")
        state = torch.load(tmp_path / "x.pth", weights_only=True)
    expected = draws()
    assert draws() != expected
    set_random_state(state)
    assert draws() == expected


VOLATILE = {"output", "workers", "knn_data"}
CONFIG = {"lr": 0.03, "epochs": 25, "schedule": [120, 160], "output": "run", "workers": 4, "knn_data": None}


def a_run(folder, config=CONFIG):
    (folder / "config.json").write_text(json.dumps(config))


def test_this_very_run_goes_on(tmp_path):
    check_same_run(tmp_path, CONFIG, VOLATILE)  # nothing there
    a_run(tmp_path)
    check_same_run(tmp_path, CONFIG, VOLATILE)
    check_same_run(tmp_path, {**CONFIG, "schedule": (120, 160)}, VOLATILE)


@pytest.mark.parametrize(("key", "value"), [("lr", 0.1), ("epochs", 26), ("schedule", [120]), ("new", 1)])
def test_a_different_run_is_refused(tmp_path, key, value):
    a_run(tmp_path)
    with pytest.raises(UserError) as caught:
        check_same_run(tmp_path, {**CONFIG, key: value}, VOLATILE)
    text = str(caught.value)
    assert f"--output {tmp_path}" in text
    assert f"{key} was {CONFIG.get(key)!r}, now {value!r}" in text
    assert "--resume" in text
    assert "\n" not in text


def test_settings_within_a_setting_are_named_one_by_one(tmp_path):
    losses = {"coss": {"s_temp": 0.1, "t_temp": 0.07}, "kd": {}}
    a_run(tmp_path, {**CONFIG, "losses": losses})
    check_same_run(tmp_path, {**CONFIG, "losses": losses}, VOLATILE)
    check_same_run(tmp_path, {**CONFIG, "losses": {}}, VOLATILE | {"losses"})
    with pytest.raises(UserError) as caught:
        check_same_run(tmp_path, {**CONFIG, "losses": {"coss": {"s_temp": 0.2, "t_temp": 0.07}, "kd": {}}}, VOLATILE)
    assert "(losses.coss.s_temp was 0.1, now 0.2)" in str(caught.value)


def test_what_differs_is_called_by_its_flag(tmp_path):
    save_json({"share": 0.5, "losses": {"coss": {"s_temp": 0.1}}, "teacher": {"share": 1}}, tmp_path / "config.json")
    now = {"share": 1, "losses": {"coss": {"s_temp": 0.2}}, "teacher": {"share": 2}}
    with pytest.raises(UserError) as caught:
        check_same_run(tmp_path, now, set(), flags={"share": "--epoch-share", "s_temp": "--student-temp"})
    assert ("(--epoch-share was 0.5, now 1; --student-temp of coss was 0.1, now 0.2; teacher.share was 1, now 2)"
            in str(caught.value))


@pytest.mark.parametrize("key", sorted(VOLATILE))
def test_how_the_work_is_done_makes_no_other_run(tmp_path, key):
    a_run(tmp_path)
    check_same_run(tmp_path, {**CONFIG, key: "changed"}, VOLATILE)
    with pytest.raises(UserError):
        check_same_run(tmp_path, {**CONFIG, key: "changed"}, VOLATILE - {key})


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"3", b"null"])
def test_an_unreadable_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="config.json is not readable"):
        check_same_run(tmp_path, CONFIG, VOLATILE)
