"""What a terminal shows: sentences under 100 characters from which paths and commands can be copied."""

import io
import sys

import pytest

from runtime.errors import run_script
from runtime.screen import folded

PATH = "/a/very/long/path/" + "folder/" * 12 + "student.pth"


def test_no_line_is_longer_and_nothing_but_spaces_changes():
    text = "one sentence that goes on " * 10
    lines = folded(text.strip(), 60).splitlines()
    assert all(len(line) <= 60 for line in lines)
    assert lines[1].startswith("  ")
    assert " ".join(map(str.strip, lines)) == text.strip()


def test_a_text_beside_its_name_continues_below_itself():
    assert folded("  verdict   it has learnt", 20) == "  verdict   it has\n            learnt"


@pytest.mark.parametrize("kept", [
    PATH, "--image-size 64 --stem cifar", "--output=/tmp/a-b", "python compute_knn.py eval --data DIR", "-b 64"])
def test_what_is_copied_stays_on_one_line(kept):
    for before in range(30, 60):  # wherever the end of the line falls
        assert kept in folded(f"{'x' * before} {kept}, since it is far more than enough", 60)


@pytest.mark.parametrize("text", [
    f"    python evaluate.py overlap --data DIR --weights {PATH} --teacher teacher.pth", "student  k=1  " * 10,
    '{"json": ' + "1, " * 60, "50%|#####     |\r" + "x " * 80, "a short line\n" * 20])
def test_code_tables_json_and_bars_stay_as_they_are(text):
    assert folded(text, 60) == text


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_breaks_lines(terminal, monkeypatch):
    class Stream(io.TextIOWrapper):
        def isatty(self):
            return terminal

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdout", Stream(io.BytesIO(), encoding="utf-8"))
    run_script(lambda: print("four " * 40))
    written = sys.stdout.buffer.getvalue().decode()
    assert max(map(len, written.splitlines())) == (79 if terminal else 200)
