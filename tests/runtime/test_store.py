"""Checkpoints are whole or not there, however a save ends; the newest whole one is found."""

import ctypes
import errno
import functools
import os
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from runtime import store as store_module
from runtime.errors import UserError
from runtime.store import (
    Checkpoints,
    Damaged,
    candidates,
    check_content,
    digest,
    find_resume,
    load_checkpoint,
    load_newest,
    read_checkpoint,
    save_checkpoint,
)


def state(steps, size=3):
    return {"epoch": steps // 10, "step": steps % 10, "steps": steps, "skipped": 0, "random": [],
            "config": {"lr": 0.1, "schedule": [1, 2], "x": None},
            "state_dict": {"w": torch.full((size,), float(steps)), "n": torch.tensor(steps),
                           "b": torch.ones(2, 2, dtype=torch.bfloat16), "e": torch.empty(0)},
            "updater": {"state": {0: {"momentum": torch.ones(2)}}}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back(tmp_path):
    save_checkpoint(state(7), tmp_path / "x.pth")
    for loaded in (load_checkpoint(tmp_path / "x.pth"), torch.load(tmp_path / "x.pth", weights_only=True)):
        assert loaded["steps"] == 7
        assert torch.equal(loaded["state_dict"]["w"], torch.full((3,), 7.0))
    assert digest(load_checkpoint(tmp_path / "x.pth")) == digest(state(7))


def test_a_digest_depends_on_everything():
    plain = {"a": [1, 2.0, "x", None], "t": torch.tensor([1.0, 2.0])}
    others = [{"a": [1, 2.0, "x", None], "t": torch.tensor([1.0, -2.0])},
              {"a": [1, 2.0, "x", None], "t": torch.tensor([[1.0, 2.0]])},
              {"a": [1, 2.0, "x", None], "t": torch.tensor([1.0, 2.0]).view(torch.int32)},
              {"a": [1, 2, "x", None], "t": torch.tensor([1.0, 2.0])},
              {"a": [[1, 2.0], "x", None], "t": torch.tensor([1.0, 2.0])},
              {"a": [1, 2.0, "x"], "t": torch.tensor([1.0, 2.0])},
              {"b": [1, 2.0, "x", None], "t": torch.tensor([1.0, 2.0])}]
    assert len({digest(value) for value in [plain, *others]}) == 8
    assert digest({"a": (1, 2.0, "x", None), "t": torch.tensor([[1.0, 0], [2.0, 0]])[:, 0]}) == digest(plain)


def test_the_last_few_are_kept(tmp_path):
    store = Checkpoints(tmp_path, keep=3)
    for steps in (5, 10, 15, 20):
        store.save(state(steps))
    assert names(tmp_path) == ["checkpoint-000000010.pth", "checkpoint-000000015.pth", "checkpoint.pth"]
    assert [load_checkpoint(path)["steps"] for path in candidates(tmp_path)] == [20, 15, 10]
    Checkpoints(tmp_path, keep=1, newest=20).save(state(25))
    assert names(tmp_path) == ["checkpoint.pth"]


def test_what_lies_beyond_the_point_that_was_gone_back_to_is_dropped(tmp_path):
    store = Checkpoints(tmp_path, keep=3)
    for steps in (5, 10, 15):
        store.save(state(steps))
    Checkpoints(tmp_path, keep=3).save(state(7))  # of a run that went on from checkpoint-000000005.pth
    assert [load_checkpoint(path)["steps"] for path in candidates(tmp_path)] == [7, 5]


def test_a_damaged_file_is_not_kept_as_an_older_one(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    store.save(state(5))
    store.save(state(10))
    (tmp_path / "checkpoint.pth").write_bytes(b"PK")
    Checkpoints(tmp_path, keep=2).save(state(8))
    assert [load_checkpoint(path)["steps"] for path in candidates(tmp_path)] == [8, 5]


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    store = Checkpoints(tmp_path, keep=2)
    for steps in (5, 10, 15):
        store.save(state(steps))
    assert [load_checkpoint(path)["steps"] for path in candidates(tmp_path)] == [15, 10]


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(50)])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, content):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_its_checksum_or_its_place_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(state(7), path)
    with pytest.raises(Damaged, match="has no checksum"):
        read_checkpoint(path)
    for change in ({"steps": "7"}, {"step": -1}, {"epoch": True}, {"skipped": None}):
        save_checkpoint({**state(7), **change}, path)
        with pytest.raises(Damaged, match="how far the run had come"):
            read_checkpoint(path)


def test_a_network_alone_is_no_damage_and_the_sentence_says_what_to_do(tmp_path):
    """The original's checkpoint (epoch, arch, state_dict, optimizer) and our student.pth, which are sound."""
    path, weights = tmp_path / "x.pth", {"w": torch.ones(2)}
    torch.save({"epoch": 25, "arch": "resnet18", "state_dict": weights, "optimizer": {"state": {}}}, path)
    with pytest.raises(UserError, match="format of another program .the original code's are such.*start anew") as said:
        load_newest([path])
    assert "damaged" not in str(said.value)
    save_checkpoint({"epoch": 1, "steps": 9, "state_dict": weights}, path)
    with pytest.raises(UserError, match="holds only the network.*give the checkpoint.pth beside it") as said:
        load_newest([path])
    torch.save({**torch.load(path, weights_only=True), "steps": 8}, path)
    with pytest.raises(UserError, match="damaged .its content does not have the checksum"):
        load_newest([path])


def test_content_of_others_passes_and_ours_is_compared(tmp_path):
    ours = torch.load(save_checkpoint(state(7), tmp_path / "x.pth"), weights_only=True)
    for content in (ours, {"w": 1}, [1], None, {"checksum": 3}, {"checksum": "of another kind"}):
        check_content(content)
    ours["state_dict"]["w"][1] = -0.5
    with pytest.raises(Damaged, match="checksum"):
        check_content(ours)


def test_a_bit_that_flips_anywhere_is_noticed_or_does_not_matter(tmp_path):
    path = save_checkpoint(state(5, size=100), tmp_path / "x.pth")
    content, right, found = path.read_bytes(), digest(read_checkpoint(path)), 0
    for place in range(0, len(content), 37):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1:])
        try:
            assert digest(read_checkpoint(path)) == right  # a byte of padding, say
        except Damaged:
            found += 1
    assert found > 40
    weights = content.index(torch.full((100,), 5.0).numpy().tobytes())
    path.write_bytes(content[:weights + 8] + b"\x01" + content[weights + 9:])
    with pytest.raises(Damaged, match="CRC-32"):
        read_checkpoint(path)


@pytest.mark.parametrize("length", [0, 1, 100, 0.5, 0.99, -1])
def test_a_truncated_newest_is_named_and_the_one_before_it_taken(tmp_path, length):
    store = Checkpoints(tmp_path, keep=2)
    store.save(state(5))
    newest = store.save(state(10))
    content = newest.read_bytes()
    newest.write_bytes(content[:int(length * len(content)) if isinstance(length, float) else length])
    path, found, said = load_newest(find_resume(tmp_path, "auto"))
    assert (path.name, found["steps"]) == ("checkpoint-000000005.pth", 5)
    assert len(said) == 1
    assert str(newest) in said[0]
    path.write_bytes(b"")
    with pytest.raises(UserError) as caught:
        load_newest(find_resume(tmp_path, "auto"))
    assert str(newest) in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 1}, {"epoch": 1, "steps": 2}])
def test_a_file_that_is_no_training_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match="not a training checkpoint"):
        load_checkpoint(tmp_path / "x.pth")


# ---- saves that do not end well


def save_and_die(folder, place):
    """In a process of its own (a fork): a save that SIGKILL ends after ``place`` bytes, or at a call of ``place``."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    if isinstance(place, int):
        write_atomic = store_module.write_atomic

        def write_some(file, content):
            file.write(bytes(content)[:place])
            file.flush()
            die()

        store_module.write_atomic = lambda path, write: write_atomic(
            path, lambda file: write(SimpleNamespace(write=functools.partial(write_some, file))))
    else:
        owner, name, when = place
        real = getattr(owner, name)
        setattr(owner, name, lambda *a, **k: (real(*a, **k), die()) if when == "after" else die())
    Checkpoints(folder, keep=2, newest=10).save(state(15))
    os._exit(0)


PLACES = [0, 1, 1000, 3000, 10**9, (os, "fsync", "before"), (os, "fsync", "after"), (os, "link", "before"),
          (os, "link", "after"), (Path, "replace", "before"), (Path, "replace", "after"), (Path, "unlink", "before")]


@pytest.mark.parametrize("place", PLACES, ids=lambda p: str(p) if isinstance(p, int) else f"{p[1]}-{p[2]}")
def test_sigkill_at_any_moment_of_a_save_loses_no_older_checkpoint(tmp_path, place):
    store = Checkpoints(tmp_path, keep=2)
    store.save(state(5))
    store.save(state(10))
    assert save_and_die(tmp_path, place) == signal.SIGKILL
    _, found, said = load_newest(find_resume(tmp_path, "auto"))
    assert found["steps"] in (10, 15)
    assert not said, "what lies under a checkpoint's name is whole"
    assert len({load_checkpoint(path)["steps"] for path in candidates(tmp_path)}) >= 2
    Checkpoints(tmp_path, keep=2, newest=found["steps"]).save(state(20))
    assert load_checkpoint(tmp_path / "checkpoint.pth")["steps"] == 20


@pytest.mark.parametrize("room", [0, 1, 2000])
def test_a_full_disk_loses_no_older_checkpoint(tmp_path, room):
    """The system refuses to let files grow beyond ``room`` bytes, as it refuses on a full disk: in mid-write."""
    store = Checkpoints(tmp_path, keep=2)
    store.save(state(5))
    store.save(state(10))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(UserError, match="could not be written .*free some space"):
            store.save(state(15, size=10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [load_checkpoint(path)["steps"] for path in candidates(tmp_path)][0] == 10
    assert not list(tmp_path.glob(".*"))
    store.save(state(20))
    assert [load_checkpoint(path)["steps"] for path in candidates(tmp_path)] == [20, 10]


def test_a_disk_that_is_truly_full(tmp_path):
    """A file system of 64 KiB, in a mount namespace of its own where the user may make one."""
    pid = os.fork()
    if not pid:
        os._exit(on_a_small_disk(tmp_path))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 77:
        pytest.skip("this user may not mount a file system")
    assert code == 0


def on_a_small_disk(folder):
    """Exit code: 0 if the save that finds no room is one sentence and leaves the checkpoint before it."""
    libc = ctypes.CDLL(None)
    new_mounts, private = 0x20000, 0x40000 | 0x4000
    if (libc.unshare(new_mounts) or libc.mount(b"none", b"/", None, private, None)
            or libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, b"size=64k")):
        return 77
    store = Checkpoints(folder, keep=2)
    store.save(state(5, size=6000))
    try:
        store.save(state(10, size=15_000))
    except UserError as error:
        return 0 if ("No space left on device" in str(error) and load_newest(candidates(folder))[1]["steps"] == 5
                     and names(folder)[-1] == "checkpoint.pth") else 1
    return 2


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        Checkpoints(tmp_path / "file", keep=2).save(state(5))


# ---- what to go on from


def test_an_empty_or_absent_folder_is_a_fresh_start(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert find_resume(folder, "auto") == []
        with pytest.raises(UserError, match="holds no checkpoint.pth"):
            find_resume(folder, "force")


def test_a_folder_that_lost_its_newest_goes_on_from_the_one_before(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    store.save(state(5))
    store.save(state(10)).unlink()
    assert [path.name for path in find_resume(tmp_path, "auto")] == ["checkpoint-000000005.pth"]
    assert find_resume(tmp_path, "force") == find_resume(tmp_path, "auto")


def test_a_path_goes_on_from_there_and_from_nothing_else(tmp_path):
    Checkpoints(tmp_path, keep=2).save(state(5))
    other = save_checkpoint(state(3), tmp_path / "other.pth")
    assert find_resume(tmp_path, str(other)) == [other]
    with pytest.raises(UserError, match=r"--resume .*nowhere.pth is not a file"):
        find_resume(tmp_path, str(tmp_path / "nowhere.pth"))
