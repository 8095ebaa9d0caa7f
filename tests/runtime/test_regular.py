"""Only regular files are read; whatever else has the name is refused at once."""

import os

import pytest

from evals.comparison import load_evaluations
from evals.sets.boxes import read_coco, read_voc
from evals.sets.label_subset import listed_subset
from runtime.errors import UserError
from runtime.regular import open_regular, read_regular_text


def pipe(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


def test_what_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfo\xc3\xa9\n")
    assert read_regular_text(tmp_path / "a") == "oé\n"
    (tmp_path / "link").symlink_to("a")
    with open_regular(tmp_path / "link") as file:
        assert len(file.read()) == 7


@pytest.mark.parametrize(("name", "reason"), [("pipe", "not a regular file"), ("/dev/zero", "not a regular file"),
                                              (".", "is a directory"), ("none", "No such file")])
def test_what_is_not(name, reason, tmp_path):
    pipe(tmp_path / "pipe")
    with pytest.raises(OSError, match=reason):
        open_regular(tmp_path / name)


@pytest.mark.parametrize("read", [
    lambda path: load_evaluations(path), lambda path: listed_subset(None, path), lambda path: read_coco(path, "."),
    lambda path: read_voc([(path.parents[2], "pipe")])])
def test_a_pipe_keeps_nobody_waiting(read, tmp_path):
    with pytest.raises(UserError, match=r"^--(compare|labels|data) .*read \(not a regular file\)"):
        read(pipe(tmp_path / "ImageSets/Main/pipe.txt"))
