"""A run's folder belongs to one job at a time, and to nobody once that job is gone."""

import errno
import fcntl
import json
import os
import signal
import socket

import pytest

from runtime.errors import UserError
from runtime.lock import FolderLock


def held_by_another(folder):
    """A child that holds the lock until it is killed: (pid, read end of a pipe that says it has it)."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        lock = FolderLock(folder)
        os.write(write, b"x")
        signal.pause()
        lock.release()
    os.close(write)
    assert os.read(read, 1) == b"x"
    os.close(read)
    return pid


def end(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_link_in_its_place_is_not_written_through(tmp_path):
    other = tmp_path / "other"
    other.write_text("of someone else")
    (tmp_path / "run.lock").symlink_to(other)
    with pytest.raises(UserError, match=r"cannot be written \(.*symbolic links\)"):
        FolderLock(tmp_path)
    assert other.read_text() == "of someone else"


def test_taken_and_released(tmp_path):
    lock = FolderLock(tmp_path / "new" / "run")
    said = json.loads((tmp_path / "new" / "run" / "run.lock").read_text())
    assert (said["host"], said["pid"]) == (socket.gethostname(), os.getpid())
    assert lock.left_by is None
    lock.release()
    assert not list((tmp_path / "new" / "run").iterdir())


def test_another_job_is_named_and_its_folder_left_alone(tmp_path):
    pid = held_by_another(tmp_path)
    before = (tmp_path / "run.lock").read_bytes()
    try:
        with pytest.raises(UserError) as caught:
            FolderLock(tmp_path)
    finally:
        end(pid)
    assert f"--output {tmp_path} is in use by process {pid} on {socket.gethostname()} since" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run.lock").read_bytes() == before
    lock = FolderLock(tmp_path)  # it was killed, and left its file
    assert f"process {pid} on " in lock.left_by
    lock.release()


def test_a_child_of_the_owner_does_not_hold_it(tmp_path):
    """Data workers outlive a main process that was killed by some seconds."""
    read, write = os.pipe()
    owner = os.fork()
    if not owner:
        FolderLock(tmp_path)
        worker = os.fork()
        if worker:
            os.write(write, f"{worker}\n".encode())
        signal.pause()
    worker = int(os.read(read, 32))
    try:
        end(owner)
        os.kill(worker, 0)
        FolderLock(tmp_path).release()
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"host": "elsewhere", "pid": 1}'])
def test_whatever_a_left_file_holds(tmp_path, content):
    (tmp_path / "run.lock").write_bytes(content)
    FolderLock(tmp_path).release()


@pytest.mark.parametrize(("owner", "taken"), [
    (None, False), ({"host": socket.gethostname(), "pid": 2**22 + 1}, False),
    ({"host": socket.gethostname(), "pid": os.getpid()}, True), ({"host": "elsewhere", "pid": 1}, True)])
def test_where_the_file_system_has_no_locks_the_file_decides(tmp_path, monkeypatch, owner, taken):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    if owner:
        (tmp_path / "run.lock").write_text(json.dumps(owner))
    if taken:
        with pytest.raises(UserError, match=r"remove .*run.lock if it has ended"):
            FolderLock(tmp_path)
    else:
        FolderLock(tmp_path).release()


def test_a_lock_that_its_owner_removes_at_that_moment_is_not_the_lock(tmp_path, monkeypatch):
    real, calls = fcntl.lockf, []

    def removed_meanwhile(*given):
        real(*given)
        if not calls:
            (tmp_path / "run.lock").unlink()
        calls.append(1)

    monkeypatch.setattr(fcntl, "lockf", removed_meanwhile)
    FolderLock(tmp_path)
    assert len(calls) == 2
    assert (tmp_path / "run.lock").exists()


def test_a_folder_that_cannot_be_had(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=f"--output {tmp_path}/file cannot be written"):
        FolderLock(tmp_path / "file")
