"""A few of the changes of tests/chaos/mutate.py: a sentence or the same content, for every format with a checksum."""

import runpy
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).resolve().parents[1] / "chaos" / "mutate.py"


@pytest.mark.skipif(not hasattr(__import__("signal"), "SIGALRM"), reason="needs SIGALRM; run it on Linux or macOS")
def test_changed_files_are_refused_or_read_as_they_were(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mutate.py", "--times", "12", "--seed", "1", "--only", "neighbours",
                                      "their .json", "clusters", "kept features", "the record of features",
                                      "checkpoint.pth", "student.pth"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(CHAOS), run_name="__main__")
    said = capsys.readouterr()
    assert stop.value.code == 0, said
    assert said.out.count("| 12 |") >= 7
