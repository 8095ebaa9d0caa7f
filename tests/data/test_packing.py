"""Packing that is interrupted, killed, repeated or out of room: what is done is kept, and gone on with."""

import errno
import multiprocessing
import os

import numpy as np
import pytest
from helpers.packs import RAW, counting, refusal

from data import packing, packing_part
from data.datasets import open_source
from data.packed import HEADER_SIZE, PackedSource
from data.packing import pack
from data.packing_part import Recipe

# ---- broken images


def test_a_broken_image_stops_the_packing_and_can_be_left_out(tree, tmp_path):
    victim = tree / "a" / "6é.jpg"
    victim.write_bytes(victim.read_bytes()[:300])
    source, path = open_source(str(tree)), tmp_path / "x.pack"
    text = refusal(pack, source, path, Recipe(), 0)
    assert str(victim) in text
    assert "--on-bad-image skip" in text
    assert not path.exists()
    done = pack(source, path, Recipe(), 0, "skip")
    assert (done.images, done.resumed) == (9, 3)
    assert [location for location, _ in done.bad] == [str(victim)]
    again = PackedSource(path)
    assert list(again.names) == [name for name in source.names if name != "a/6é.jpg"]
    assert [again.encoded(i) for i in range(9)] == [(tree / name).read_bytes() for name in again.names]
    assert again.fingerprint() != source.fingerprint()


def test_nothing_but_broken_images(tmp_path):
    (tmp_path / "t" / "a").mkdir(parents=True)
    (tmp_path / "t" / "a" / "0.jpg").write_bytes(b"no")
    source = open_source(str(tmp_path / "t"))
    assert "no image that can be decoded" in refusal(pack, source, tmp_path / "x.pack", Recipe(), 0, "skip")
    assert not (tmp_path / "x.pack").exists()


# ---- killed, and gone on with


def kill_at(path, number):
    source = counting()
    source.stop_at, source.stop = number, lambda: os._exit(9)
    packing_part.FLUSH_SECONDS = -1
    pack(source, path, RAW, 0)


@pytest.mark.parametrize("torn", [0, 1, 47])
def test_a_killed_pack_goes_on(tmp_path, monkeypatch, torn):
    monkeypatch.setattr(packing, "_check_room", lambda *_: None)
    path, whole = tmp_path / "x.pack", tmp_path / "whole.pack"
    process = multiprocessing.get_context("fork").Process(target=kill_at, args=(path, 13))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert not path.exists()
    if torn:  # the machine went down while the last line was written
        index = tmp_path / "x.pack.part.index"
        index.write_bytes(index.read_bytes()[:-torn])
    source = counting()
    done = pack(source, path, RAW, 0)
    first = 12 if torn else 13
    assert source.asked == tuple(range(first, 20))
    assert done.resumed == first
    pack(counting(), whole, RAW, 0)
    assert path.read_bytes() == whole.read_bytes()


def test_an_interrupted_pack_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_check_room", lambda *_: None)

    def interrupt():
        raise KeyboardInterrupt

    source, path = counting(), tmp_path / "x.pack"
    source.stop_at, source.stop = 5, interrupt
    with pytest.raises(KeyboardInterrupt):
        pack(source, path, RAW, 0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.pack.part", "x.pack.part.index"]
    assert pack(counting(), path, RAW, 0).resumed == 5
    assert [file.name for file in tmp_path.iterdir()] == ["x.pack"]


def test_a_part_of_something_else(tmp_path, monkeypatch):
    test_path = tmp_path / "x.pack"
    source = counting()
    source.stop_at, source.stop = 5, lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    monkeypatch.setattr(packing, "_check_room", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        pack(source, test_path, Recipe("raw", 4), 0)
    assert "short_side was 4, now 24" in refusal(pack, counting(), test_path, RAW, 0)
    assert "other names" in refusal(pack, counting().take(np.arange(20)[::-1]), test_path, Recipe("raw", 4), 0)
    (tmp_path / "x.pack.part.index").write_bytes(b"\0")
    assert "x.pack.part.index, which would say what it is" in refusal(pack, counting(), test_path, RAW, 0)
    assert (tmp_path / "x.pack.part").stat().st_size == HEADER_SIZE + 5 * 4 * 4 * 3


def test_two_at_once(tmp_path):
    first = packing_part.UnfinishedPack(counting(), tmp_path / "x.pack", RAW)
    assert "another process" in refusal(pack, counting(), tmp_path / "x.pack", RAW, 0)
    first.close()
    assert not list(tmp_path.iterdir())


def test_done_already_or_in_the_way(packed, tree):
    source, before = open_source(str(tree)), packed.stat().st_mtime_ns
    assert pack(source, packed, Recipe(), 0).resumed == 10
    assert "exists, but is not a pack of these images" in refusal(pack, source, packed, RAW, 0)
    assert "exists, but is not a pack of these images" in refusal(pack, source.take(np.arange(3)), packed, Recipe(), 0)
    assert packed.stat().st_mtime_ns == before


# ---- full disks


def test_too_little_room_is_found_before(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5000}))
    assert "5.0 kB are free" in refusal(pack, open_source(str(tree)), tmp_path / "out" / "x.pack", RAW, 0)
    assert not list((tmp_path / "out").iterdir())


def test_a_disk_that_fills_keeps_what_is_done(tmp_path, monkeypatch):
    write_all, room = packing_part.write_all, [4 * 192]

    def full(file, content):
        if str(file.name).endswith(".part") and len(content) == 192:
            room[0] -= 192
            if room[0] < 0:
                write_all(file, content[:100])
                raise OSError(errno.ENOSPC, "No space left on device")
        write_all(file, content)

    monkeypatch.setattr(packing_part, "write_all", full)
    text = refusal(pack, counting(), tmp_path / "x.pack", RAW, 0)
    assert "No space left on device" in text
    assert "after 4 of 20" in text
    assert not (tmp_path / "x.pack").exists()
    room[0] = 1 << 30
    assert pack(counting(), tmp_path / "x.pack", RAW, 0).resumed == 4
    assert np.array_equal(PackedSource(tmp_path / "x.pack").open(19), counting().images[19])
