"""Rows written by several processes, in any order and over several runs, come out as one whole file or not at all."""

import errno
import json
import os
import time
import zlib

import numpy as np
import pytest
import torch
from helpers.ranks import on_ranks

import search.rowfile
from runtime.device import Process
from runtime.errors import UserError
from search.rowfile import RowFile, one_writer

RANKS = [Process(rank, 3, torch.device("cpu")) for rank in range(3)]
ROWS = np.arange(40, dtype=np.int64).reshape(10, 4)
ZEROS = zlib.crc32(bytes(32))  # of a row that is not written yet


def open_file(tmp_path, identity="a", process=RANKS[0], dtype=np.int64, rows=10):
    return RowFile(tmp_path / "out" / "found.npy", {"of": identity}, rows, 4, dtype, process)


def publish(tmp_path):
    return lambda rows, _: rows.replace(tmp_path / "out" / "found.npy")


def test_ranges_of_several_ranks_make_one_file(tmp_path):
    files = [open_file(tmp_path, process=process) for process in RANKS]
    for rank, (first, last) in zip((2, 0, 1), ((7, 10), (0, 3), (3, 7)), strict=True):
        files[rank].write(first, ROWS[first:last])
    assert not (tmp_path / "out" / "found.npy").exists()
    files[0].finish(publish(tmp_path))
    found = np.load(tmp_path / "out" / "found.npy", allow_pickle=False)
    assert found.dtype == np.int64
    assert np.array_equal(found, ROWS)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["found.npy"]


def test_what_is_missing(tmp_path):
    file = open_file(tmp_path)
    assert file.missing(range(2, 9)) == [range(2, 9)]
    for first, last in ((3, 5), (4, 6), (8, 9)):
        file.write(first, ROWS[first:last])
    again = open_file(tmp_path, process=RANKS[1])
    assert again.missing(range(10)) == [range(3), range(6, 8), range(9, 10)]
    assert again.missing(range(4, 6)) == []
    assert again.missing(range(5, 7)) == [range(6, 7)]
    assert again.missing(range(0)) == []
    with pytest.raises(RuntimeError, match="not written"):
        again.__class__.finish(open_file(tmp_path), publish(tmp_path))


@pytest.mark.parametrize("left", ["\n0", f"\n0 1 {ZEROS}", f"0 10 {ZEROS}", f"\n0 1 {ZEROS}\n5 ", "\n-3 9 0\n",
                                  "\nx y z\n", "\n0 1\n", "\n0 1 7\n", f"\n0 1 {'9' * 30}\n", f"\n0 {'9' * 18} 7\n",
                                  "\n3 3 0\n"])
def test_a_line_that_a_kill_cut_short_is_not_believed(left, tmp_path):
    file = open_file(tmp_path)
    file.write(3, ROWS[3:4])
    with (tmp_path / "out" / "found.partial" / "done-0.txt").open("a") as progress:
        progress.write(left)
    again = open_file(tmp_path)
    done = 10 - sum(map(len, again.missing(range(10))))
    assert done == (2 if f"{ZEROS}\n" in left else 1)
    again.write(8, ROWS[8:10])
    assert open_file(tmp_path).missing(range(8, 10)) == []


@pytest.mark.parametrize("other", [{"identity": "b"}, {"dtype": np.int32}, {"rows": 11}])
def test_unfinished_work_of_other_settings_is_refused_and_stays(other, tmp_path):
    open_file(tmp_path).write(0, ROWS)
    with pytest.raises(UserError, match=r"found.partial is unfinished work of other settings \(\w+ was .*, now .*\); "):
        open_file(tmp_path, **other)
    assert open_file(tmp_path).missing(range(10)) == []


@pytest.mark.parametrize("unfinished", [True, False])
def test_files_of_someone_else_stay(unfinished, tmp_path):
    """Where nothing was begun they are in the way; where they came later, they outlast what is finished."""
    folder = tmp_path / "out" / "found.partial"
    if unfinished:
        file = open_file(tmp_path)
        file.write(0, ROWS)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "thesis.txt").write_text("mine")
    if unfinished:
        file.finish(publish(tmp_path))
        assert (tmp_path / "out" / "found.npy").exists()
    with pytest.raises(UserError,
                       match=r"found.partial holds thesis.txt, which does not belong to an unfinished found.npy"):
        open_file(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_rows_that_a_kill_left_before_their_record_are_started_anew(tmp_path):
    folder = tmp_path / "out" / "found.partial"
    folder.mkdir(parents=True)
    (folder / "rows.npy").write_bytes(b"half a header")
    (folder / ".identity.json.17.tmp").write_text("{")
    assert open_file(tmp_path).missing(range(10)) == [range(10)]
    assert sorted(path.name for path in folder.iterdir()) == ["identity.json", "rows.npy"]


def test_a_damaged_record_is_started_anew(tmp_path):
    open_file(tmp_path).write(0, ROWS)
    (tmp_path / "out" / "found.partial" / "identity.json").write_text("{")
    assert open_file(tmp_path).missing(range(10)) == [range(10)]
    json.loads((tmp_path / "out" / "found.partial" / "identity.json").read_text())


def test_rows_that_do_not_fit(tmp_path):
    file = open_file(tmp_path)
    for first, rows in ((8, ROWS[:3]), (0, ROWS[:, :3])):
        with pytest.raises(ValueError, match="do not fit"):
            file.write(first, rows)


def test_a_full_disk_is_known_before_the_work(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(search.rowfile, "reserve", full)
    with pytest.raises(UserError) as caught:
        open_file(tmp_path)
    assert "found.npy" in str(caught.value)
    assert "No space left" in str(caught.value)
    assert "free some space" in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def write_share(rank, path, inside):
    process = Process(rank, 2, torch.device("cpu"), torch.distributed.group.WORLD)
    with one_writer(path, process):
        (path.parent / inside / f"{rank}").touch()
        assert not (path.parent / "other").exists(), "the other job was still writing"
        file = RowFile(path, {}, 10, 4, np.int64, process)
        file.write(5 * rank, ROWS[5 * rank:5 * rank + 5])
        file.finish(lambda rows, _: rows.replace(path))


def test_ranks_write_together_after_the_job_that_wrote_before(tmp_path):
    path, (read, write) = tmp_path / "found.npy", os.pipe()
    for inside in ("inside", "meet"):
        (tmp_path / inside).mkdir()
    other = os.fork()
    if not other:
        with one_writer(path, Process(0, 1, torch.device("cpu"))):
            (tmp_path / "other").touch()
            os.write(write, b"x")
            time.sleep(3)
            (tmp_path / "other").unlink()
        os._exit(0)
    assert os.read(read, 1) == b"x"
    on_ranks(2, write_share, tmp_path / "meet", path, "inside")
    assert os.waitpid(other, 0)[1] == 0
    assert np.array_equal(np.load(path), ROWS)
    assert len(list((tmp_path / "inside").iterdir())) == 2
    assert not list(tmp_path.glob("*.lock"))


def test_a_lock_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with (pytest.raises(UserError, match=f"{tmp_path}/file/found.npy could not be written"),
          one_writer(tmp_path / "file" / "found.npy", Process(0, 1, torch.device("cpu")))):
        pass


def test_a_folder_that_is_not_shared(tmp_path):
    with pytest.raises(UserError, match="found.partial does not exist there; .*all machines share"):
        open_file(tmp_path, process=RANKS[1])


@pytest.mark.parametrize("without", [True, False])
def test_room_is_taken_at_once(without, tmp_path, monkeypatch):
    if without:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    open_file(tmp_path)
    path = tmp_path / "out" / "found.partial" / "rows.npy"
    assert np.load(path).shape == (10, 4)
    assert path.stat().st_blocks * 512 >= 320
