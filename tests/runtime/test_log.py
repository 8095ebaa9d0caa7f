"""What a run leaves: metrics that survive an interruption once, means, and the speed meter."""

import contextlib
import json
import os

import pytest
import torch

import runtime.log
from runtime.errors import UserError
from runtime.log import Averages, Meter, RunLog, duration


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_first_start(tmp_path, capsys):
    log = RunLog(tmp_path / "run", {"lr": 0.1, "x": [1]}, is_main=True)
    log.say("hello")
    log.scalars(5, 0, {"loss": 1.5, "lr": 0.1})
    log.scalars(9, 1, {"top1": 30.0}, "knn")
    log.close()
    folder = tmp_path / "run"
    assert json.loads((folder / "config.json").read_text()) == {"lr": 0.1, "x": [1]}
    assert metrics(folder) == [{"step": 5, "epoch": 1, "group": "train", "loss": 1.5, "lr": 0.1},
                               {"step": 9, "epoch": 2, "group": "knn", "top1": 30.0}]
    assert (folder / "log.txt").read_text().endswith(" hello\n")
    assert capsys.readouterr().out == "hello\n"
    assert [path.name for path in folder.iterdir() if path.name.startswith("events.")]


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = RunLog(tmp_path / "run", {"lr": 0.1}, is_main=False)
    log.say("hello")
    log.scalars(5, 0, {"loss": 1.5})
    log.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_lines_after_the_step_that_is_gone_on_from_are_dropped(tmp_path):
    log = RunLog(tmp_path, {}, is_main=True)
    for step in (5, 10, 15, 20):
        log.scalars(step, step // 10, {"loss": float(step)})
    log.say("first")
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "epo')  # cut short by a power failure
    log = RunLog(tmp_path, {}, is_main=True, first_step=10)
    log.scalars(15, 1, {"loss": -15.0})
    log.say("second")
    log.close()
    assert [(line["step"], line["loss"]) for line in metrics(tmp_path)] == [(5, 5.0), (10, 10.0), (15, -15.0)]
    text = (tmp_path / "log.txt").read_text()
    assert "first" in text
    assert "second" in text


def test_junk_among_the_metrics_is_left_out_and_said(tmp_path, capsys):
    """At an epoch's end that has still to be scored, lines of the epoch as a whole are written again."""
    whole = [{"step": 5, "epoch": 0, "group": "train", "loss": 5.0}, {"step": 10, "epoch": 0, "group": "train"},
             {"step": 10, "epoch": 0, "group": "knn", "top1": 3.0}, {"step": 15, "epoch": 1, "group": "train"}]
    junk = [b"[1]", b"3", b"null}", b"{}", b'{"step": "x", "group": "train"}', b"\xff\xfe{}", b"[" * 100_000,
            b'{"step": 3}', b'{"step": null, "group": "train"}']
    content = b"".join(json.dumps(line).encode() + b"\n" for line in whole)
    for within, kept in ((False, 3), (True, 2)):
        (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(junk) + b"\n" + content + b'{"step": 16, "ep')
        RunLog(tmp_path, {}, is_main=True, first_step=10, within_epoch=within).close()
        assert metrics(tmp_path) == whole[:kept]
        assert f"metrics.jsonl: {len(junk)} lines that are not" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt", "config.json"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_only_regular_files_are_written(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} (is a|could not be written)"):
        RunLog(tmp_path, {}, is_main=True, first_step=10)


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
def test_nothing_is_written_through_a_link(tmp_path, name):
    other = tmp_path / "other"
    other.write_text("of someone else")
    (tmp_path / name).symlink_to(other)
    with contextlib.suppress(UserError):
        log = RunLog(tmp_path, {}, is_main=True, first_step=10)
        log.scalars(1, 0, {"loss": 1.0})
        log.close()
    assert other.read_text() == "of someone else"


class Gone:
    """A screen whose reader went away, or that leads to a full disk."""

    def __init__(self, error):
        self.error, self.file = error, open(os.devnull, "w")  # noqa: SIM115, PTH123

    def write(self, text):
        raise self.error

    def flush(self):
        pass

    def fileno(self):
        return self.file.fileno()


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
def test_a_run_outlasts_its_screen(tmp_path, monkeypatch, error):
    log = RunLog(tmp_path, {}, is_main=True)
    monkeypatch.setattr("sys.stdout", Gone(error))
    log.say("one")
    log.say("two")
    log.close()
    assert log.problem is None
    assert [line[20:] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["one", "two"]


def test_a_fresh_start_in_a_used_folder_begins_anew(tmp_path):
    for word in ("first", "second"):
        log = RunLog(tmp_path, {"word": word}, is_main=True)
        log.scalars(5, 0, {"loss": 1.0})
        log.say(word)
        log.close()
    assert len(metrics(tmp_path)) == 1
    assert "first" not in (tmp_path / "log.txt").read_text()
    assert json.loads((tmp_path / "config.json").read_text()) == {"word": "second"}


def test_averages():
    averages = Averages()
    assert averages.take() == {}
    averages.add({"loss": torch.tensor(1.0, requires_grad=True), "features": torch.zeros(3, 4)})
    averages.add({"loss": torch.tensor(2.0), "rare": torch.tensor(7.0, dtype=torch.float64)})
    averages.add({"loss": torch.tensor(6.0, dtype=torch.float16)})
    assert averages.take() == {"loss": 3.0, "rare": 7.0}
    assert averages.take() == {}
    averages.add({"loss": torch.tensor(5.0)})
    assert averages.take() == {"loss": 5.0}


def test_averages_go_on():
    averages = Averages()
    for value in (0.1, 0.2, 0.7):
        averages.add({"loss": torch.tensor(value)})
        other = Averages()
        other.load_state_dict(averages.state_dict(), torch.device("cpu"))
        averages = other
    expected = Averages()
    for value in (0.1, 0.2, 0.7):
        expected.add({"loss": torch.tensor(value)})
    assert averages.take() == expected.take()


def test_a_disk_that_fills_up_is_no_traceback(tmp_path):
    log = RunLog(tmp_path, {}, is_main=True)
    log.metrics.close()
    log.metrics = open("/dev/full", "a")  # noqa: SIM115, PTH123
    assert log.problem is None
    log.scalars(1, 0, {"loss": 1.0})
    assert "No space left on device" in str(log.problem)
    assert str(tmp_path) in str(log.problem)


def test_meter(monkeypatch):
    """With a clock that only waiting and working move."""
    now = [100.0]
    monkeypatch.setattr(runtime.log.time, "perf_counter", lambda: now[0])

    def loader():
        for batch in range(4):
            now[0] += 1.0  # a second to load
            yield batch

    meter = Meter(loader(), 4, images_per_step=30, label="x", is_main=False)
    seen = []
    for batch in meter:
        now[0] += 3.0  # and three to compute
        seen.append(batch)
        if batch == 1:
            assert meter.rates() == {"images_per_second": pytest.approx(2 * 30 / 8), "data_wait": pytest.approx(0.25)}
    assert seen == [0, 1, 2, 3]
    assert meter.rates() == {"images_per_second": pytest.approx(2 * 30 / 8), "data_wait": pytest.approx(0.25)}
    assert meter.wait_share() == pytest.approx(3 * 1 / (3 * 4))  # the first batch's wait is the workers' start


def test_duration():
    assert [duration(s) for s in (0, 7.9, 187, 3599, 3600, 3720, 90061)] == [
        "0m00s", "0m07s", "3m07s", "59m59s", "1h00m", "1h02m", "25h01m"]


def test_names_with_bytes_that_are_not_utf8_reach_the_log(tmp_path):
    log = RunLog(tmp_path, {}, is_main=True)
    log.say("left out: " + os.fsdecode(b"caf\xe9.jpg"))
    log.close()
    assert b"left out: caf\xe9.jpg\n" in (tmp_path / "log.txt").read_bytes()


def test_names_with_control_codes_do_not_reach_the_log(tmp_path):
    """As on the terminal, which obeys them again when the file is shown."""
    log = RunLog(tmp_path, {}, True)
    log.say("bad\x1b]0;owned\x07.jpg \x1b[2J\u202egnp\r\ttab é\nsecond line")
    log.close()
    text = (tmp_path / "log.txt").read_bytes().decode()
    assert text[len("2020-01-01 00:00:00 "):] == "bad?]0;owned?.jpg ?[2J?gnp?\ttab é\nsecond line\n"


def test_a_folder_whose_name_is_not_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    log = RunLog(folder, {}, is_main=True)
    log.scalars(5, 0, {"loss": 1.5})
    log.close()
    assert [path.stat().st_size > 50 for path in folder.glob("events.*")] == [True]
    assert metrics(folder)[0]["loss"] == 1.5
