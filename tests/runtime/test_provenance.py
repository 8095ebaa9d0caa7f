"""How a run was made, in its config.json."""

import json
import os
import subprocess
import sys

import torch

from runtime import provenance


def test_a_start_in_plain_values(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "my photos"])
    found = provenance.start_of(torch.device("cpu"))
    assert json.loads(json.dumps(found)) == found
    assert found["command"] == "train.py --data 'my photos'"
    assert found["torch"] == torch.__version__
    assert found["hardware"]


def test_the_commit_and_whether_files_were_changed_since(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() is None

    def git(*words):
        return subprocess.run(["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *words], check=True,
                              capture_output=True, text=True, env={"PATH": os.environ["PATH"]}).stdout.strip()

    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")
    (tmp_path / "notes.txt").write_text("not the code's")
    assert provenance.commit() == head
    (tmp_path / "a.py").write_text("2")
    assert provenance.commit() == head + "+"


def test_earlier_starts_are_what_the_file_has(tmp_path):
    assert provenance.starts_before(tmp_path) == []
    for text, expected in (('{"starts": [{"time": "t"}]}', [{"time": "t"}]), ("[1]", []), ('{"starts": 3}', []),
                           ("{", [])):
        (tmp_path / "config.json").write_text(text)
        assert provenance.starts_before(tmp_path) == expected
