"""The packed file: what goes in comes out, in order and under its name, after a kill too; each kind of damage."""

import errno
import io
import itertools
import json
import multiprocessing
import os
import pickle
import zlib

import numpy as np
import pytest
import torch
from helpers.ranks import PREPARED
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import data.packed as data_packed
from data import packing, packing_part
from data.datasets import open_source
from data.images import BadImage
from data.packed import HEADER, HEADER_SIZE, RECORD, PackedSource, digest_of, pack_header
from data.packing import pack
from data.packing_part import Recipe
from data.sources import ArraySource
from data.splits import open_labelled
from runtime.errors import UserError

SIZES = [(40, 30), (20, 60), (16, 16), (33, 50), (90, 31), (24, 24), (48, 64)]
JPEG, RAW = Recipe("jpeg", 24, 90), Recipe("raw", 24)


def picture(number):
    width, height = SIZES[number % len(SIZES)]
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 2, y * 2, (x + y + 20 * number) % 256], -1).astype(np.uint8))


@pytest.fixture
def tree(tmp_path):
    """Two classes, 10 images of several sizes, JPEG and PNG, with names that sort otherwise than numbers."""
    for number in range(10):
        path = tmp_path / "tree" / ("b" if number % 2 else "a") / f"{number}é.{'png' if number == 4 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return tmp_path / "tree"


def refusal(call, *args, **options):
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def original_size(source, i):
    record = source.records[i]
    return int(record["width"]), int(record["height"])


@pytest.fixture
def packed(tree, tmp_path):
    pack(open_source(str(tree)), tmp_path / "train.pack", Recipe(), 0)
    return tmp_path / "train.pack"


# ---- what goes in comes out


@pytest.mark.parametrize("workers", [0, 2])
def test_original_is_byte_for_byte_the_folder(tree, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK", 3)
    source = open_source(str(tree))
    done = pack(source, tmp_path / "x.pack", Recipe(), workers)
    again = open_source(str(tmp_path / "x.pack"), labelled=True)
    assert (done.images, done.size, done.bad) == (10, (tmp_path / "x.pack").stat().st_size, [])
    assert list(again.names) == list(source.names)
    assert again.fingerprint() == source.fingerprint()
    assert again.labels.tolist() == source.labels.tolist()
    assert again.classes == ["a", "b"]
    for i, name in enumerate(source.names):
        assert again.encoded(i) == (tree / name).read_bytes()
        with Image.open(tree / name) as image:
            assert original_size(again, i) == image.size
            assert np.array_equal(again.open(i), image.convert("RGB"))
        assert torch.equal(again.pixels(i), source.pixels(i))
    assert again.location(2) == f"{tmp_path}/x.pack: record {source.names[2]}"
    assert not list(tmp_path.glob("*.part*"))


def test_the_file_is_laid_out_as_documented(packed, tree):
    """Read by struct and slices alone."""
    content = packed.read_bytes()
    magic, version, _, count, start, names, meta, end, _ = HEADER.unpack_from(content)
    assert (magic, version, count, end) == (b"\x89CoSSpk\n", 1, 10, len(content))
    records = np.frombuffer(content[start:names], RECORD)
    block = content[names:meta].decode().split("\n")[:-1]
    assert json.loads(content[meta:])["classes"] == ["a", "b"]
    for record, name in zip(records, block, strict=True):
        blob = content[record["offset"] : record["offset"] + record["size"]]
        assert blob == (tree / name).read_bytes()
        assert record["crc"] == zlib.crc32(blob)
        assert "ab"[record["label"]] == name[0]


def test_raw_and_jpeg_are_pillows_resize(tree, tmp_path):
    source = open_source(str(tree))
    pack(source, tmp_path / "r.pack", RAW, 0)
    pack(source, tmp_path / "j.pack", JPEG, 0)
    raw, jpeg = PackedSource(tmp_path / "r.pack"), PackedSource(tmp_path / "j.pack")
    assert raw.fingerprint() == jpeg.fingerprint() == source.fingerprint()
    for i in range(len(source)):
        image = source.open(i)
        width, height = image.size
        is_small = min(image.size) <= 24
        if not is_small:
            scale = 24 / min(image.size)
            image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
        assert np.array_equal(raw.open(i), image)
        assert raw.encoded(i) is None
        pixels = raw.pixels(i)
        assert np.array_equal(pixels.permute(1, 2, 0), image)
        pixels.zero_()  # the caller's own copy
        assert original_size(raw, i) == original_size(jpeg, i) == (width, height)
        assert raw.pixels(i).float().mean() > 0
        expected = io.BytesIO()
        image.save(expected, "JPEG", quality=90)
        assert jpeg.encoded(i) == (source.encoded(i) if is_small else expected.getvalue())


def test_images_in_memory_are_packed_without_loss(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 9, 7, 3), dtype=np.uint8)
    source = ArraySource(images, None, [], "made/train")
    for recipe in (Recipe(), RAW):
        pack(source, tmp_path / f"{recipe.mode}.pack", recipe, 0)
        again = PackedSource(tmp_path / f"{recipe.mode}.pack")
        assert again.labels is None
        assert again.fingerprint() == source.fingerprint()
        assert all(np.array_equal(again.open(i), images[i]) for i in range(5))


def test_take_and_subset(packed, tree):
    folder, source = open_source(str(tree)), PackedSource(packed)
    part, expected = source.subset(0.5), folder.subset(0.5)
    assert list(part.names) == list(expected.names)
    assert part.fingerprint() == expected.fingerprint()
    assert part.labels.tolist() == expected.labels.tolist()
    twice = part.take(np.array([3, 0]))
    assert [twice.encoded(i) for i in range(2)] == [expected.encoded(3), expected.encoded(0)]
    assert twice.location(0).endswith(expected.names[3])
    assert len(source) == 10
    with pytest.raises(IndexError):
        twice.encoded(2)


def test_splits_beside_one_another(tree, tmp_path):
    root = tmp_path / "packs"
    source = open_source(str(tree))
    pack(source.take(np.arange(8)), root / "train.pack", Recipe(), 0)
    pack(source.take(np.array([9])), root / "val.pack", Recipe(), 0)
    train, test = open_labelled(str(root))
    assert (len(train), len(test), test.labels.tolist()) == (8, 1, [1])
    assert pickle.loads(pickle.dumps(test)).labels.tolist() == [1]
    (root / "val.pack").rename(root / "test.pack")
    assert open_source(str(root), "test").fingerprint() == test.fingerprint()
    (root / "test.pack").unlink()
    assert "train.pack but no val/ or test/" in refusal(open_source, str(root), "test")
    tree.rename(root / "train")  # a sub-folder comes first, as it did before the pack was put beside it
    assert len(open_source(str(root))) == 10


# ---- workers


class Bytes(Dataset):
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        return self.source.encoded(i)


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), (PREPARED, 1)], ids=["fork", "sent"])
def test_workers_open_the_file_themselves(packed, context, workers):
    source = PackedSource(packed)
    assert len(pickle.dumps(source)) < 300 + len(str(packed))
    part = source.take(np.array([7, 1, 1, 4]))
    loader = DataLoader(Bytes(part), batch_size=2, num_workers=workers, collate_fn=list,
                        multiprocessing_context=context)
    assert [content for batch in loader for content in batch] == [part.encoded(i) for i in range(4)]
    again = pickle.loads(pickle.dumps(source))
    assert [again.encoded(i) for i in range(10)] == [source.encoded(i) for i in range(10)]


def test_pickled_labels_and_names(packed):
    part = PackedSource(packed).subset(0.5)
    part.labels, part.classes = part.labels + 1, ["z", "a", "b"]
    again = pickle.loads(pickle.dumps(part))
    assert (again.labels.tolist(), again.classes, again.title) == (part.labels.tolist(), part.classes, part.title)
    assert list(again.names) == list(part.names)


def test_another_file_in_its_place_is_noticed(packed, tree, tmp_path):
    pickled = pickle.dumps(PackedSource(packed))
    pack(open_source(str(tree)).take(np.arange(3)), tmp_path / "other.pack", Recipe(), 0)
    (tmp_path / "other.pack").replace(packed)
    assert "was replaced" in refusal(pickle.loads, pickled)


def test_the_identity_is_the_names_and_the_content(tree, packed, tmp_path):
    folder, pack_of = open_source(str(tree)), lambda path: PackedSource(path).take(np.array([3, 1]))
    assert folder.identity().startswith(folder.fingerprint())
    other, before = tmp_path / "raw.pack", pack_of(packed)
    pack(folder, other, RAW, 0)
    assert pack_of(other).fingerprint() == before.fingerprint() == folder.take(np.array([3, 1])).fingerprint()
    assert len({pack_of(other).identity(), before.identity(), PackedSource(packed).identity(), folder.identity()}) == 4
    assert pickle.loads(pickle.dumps(before)).identity() == before.identity()


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


class Counting(ArraySource):
    """Counts what it is asked for, and calls `stop` at one image."""

    stop_at, asked = None, ()

    def open(self, i):
        if i == self.stop_at:
            self.stop()
        self.asked += (i,)
        return super().open(i)


def counting():
    images = np.random.default_rng(1).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    return Counting(images, np.arange(20) % 2, ["a", "b"], "made")


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


# ---- damage


def test_foreign_and_damaged_files(packed, tmp_path):
    content = packed.read_bytes()
    start, meta = HEADER.unpack_from(content)[4], HEADER.unpack_from(content)[6]
    cases = {
        "not a packed file": [b"", b"x", b"PK\3\4" * 100, b"\0" * HEADER_SIZE, content[:50]],
        "is damaged": [content[:-1], content[: len(content) // 2], content[:HEADER_SIZE], content + b"\0"],
        "version 7": [content[:8] + b"\7" + content[9:]],
        "does not match its checksum": [
            content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
            for place in (16, 24, 32, 60, start, start + 9, start + 80, meta - 3, meta + 4, len(content) - 1)
        ],
    }
    for expected, contents in cases.items():
        for bad in contents:
            (tmp_path / "bad.pack").write_bytes(bad)
            text = refusal(open_source, str(tmp_path / "bad.pack"), flag="--knn-data")
            assert expected in text
            assert text.startswith(f"--knn-data {tmp_path / 'bad.pack'}")
    (tmp_path / "no_such_ending").write_bytes(content)
    assert len(open_source(str(tmp_path / "no_such_ending"))) == 10


@pytest.mark.parametrize("mode", ["original", "raw"])
def test_verify_names_the_damaged_record(tree, tmp_path, mode):
    path = tmp_path / "x.pack"
    pack(open_source(str(tree)), path, Recipe() if mode == "original" else RAW, 0)
    source = PackedSource(path)
    assert [problem for _, problem in source.damaged()] == [None] * 10
    place = int(source.records["offset"][6]) + 5
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)
    assert [i for i, problem in PackedSource(path).damaged() if problem] == [6]


def test_a_disk_that_fails_is_a_bad_image(packed, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    source = PackedSource(packed)
    for read, reason in [(lambda *_: b"\xff", "ends within"), (fail, "Input/output error")]:
        monkeypatch.setattr(data_packed, "_pread", read)
        with pytest.raises(BadImage, match=reason):
            source.open(8)


# ---- what is damaged, or was written by another hand


def rewritten(path, change):
    """The pack with its index changed, under a checksum that fits."""
    content = bytearray(path.read_bytes())
    _, _, _, count, start, names, meta, end, _ = HEADER.unpack_from(content)
    records = np.frombuffer(content[start:names], RECORD).copy()
    parts = {"records": records, "names": bytes(content[names:meta]), "meta": json.loads(content[meta:end])}
    change(parts)
    tail = [parts["records"].tobytes(), parts["names"], parts["meta"] if isinstance(parts["meta"], bytes) else
            json.dumps(parts["meta"]).encode()]
    places = list(itertools.accumulate(map(len, tail), initial=start))
    header = pack_header(count, *places)
    path.write_bytes(pack_header(count, *places, digest_of(header, b"".join(tail))) + content[HEADER_SIZE:start]
                     + b"".join(tail))


def put(field, value, row=3):
    def change(parts):
        parts["records"][field][row] = value
    return change


@pytest.mark.parametrize(("change", "says"), [
    (put("label", 2), "a label is outside its 2 classes"), (put("label", -1), "a label"),
    (put("name_end", 1), "its names do not end"), (put("name_end", 10**6), "its names"),
    (put("name_end", 10**6, -1), "its names"), (put("offset", 10**9), "a record lies outside"),
    (put("offset", 2**64 - 1), "a record"), (put("offset", 0), "a record"), (put("size", 2**31), "a record"),
    (lambda parts: parts["meta"].update(mode="webp"), "its meta"),
    (lambda parts: parts["meta"].pop("classes"), "its meta"),
    (lambda parts: parts["meta"].update(classes=[1, 2]), "its meta"),
    (lambda parts: parts["meta"].update(short_side="x"), "its meta"),
    (lambda parts: parts.update(meta=b"[1"), "its meta"), (lambda parts: parts.update(meta=b"[" * 10**5), "its meta"),
])
def test_an_index_that_cannot_be_is_refused_on_opening(packed, change, says):
    rewritten(packed, change)
    assert f"is damaged: {says}" in refusal(PackedSource, packed)


def test_raw_records_have_the_size_of_their_pixels(tree, tmp_path):
    pack(open_source(str(tree)), tmp_path / "raw.pack", RAW, 0)
    rewritten(tmp_path / "raw.pack", lambda parts: None)
    PackedSource(tmp_path / "raw.pack").open(3)
    rewritten(tmp_path / "raw.pack", put("stored_width", 2**31))
    assert "the size of a record is not that of its pixels" in refusal(PackedSource, tmp_path / "raw.pack")


@pytest.mark.parametrize("recipe", [Recipe(), JPEG, RAW])
def test_a_changed_byte_of_a_record_is_not_read(tree, tmp_path, recipe):
    path = tmp_path / "x.pack"
    pack(open_source(str(tree)), path, recipe, 0)
    content = bytearray(path.read_bytes())
    content[int(PackedSource(path).records["offset"][5]) + 40] ^= 1
    path.write_bytes(content)
    source = PackedSource(path)
    for way in (source.open, source.pixels):
        way(4)
        with pytest.raises(BadImage, match="checksum"):
            way(5)


def test_an_image_too_large_for_a_jpeg_is_named_with_the_limit(tmp_path):
    (tmp_path / "x").mkdir()
    Image.new("L", (70_000, 25)).save(tmp_path / "x" / "long.png")
    Image.new("L", (30, 30)).save(tmp_path / "x" / "short.png")
    source = open_source(str(tmp_path / "x"))
    said = refusal(pack, source, tmp_path / "x.pack", JPEG, 0)
    assert f"{tmp_path / 'x' / 'long.png'} could not be packed (its 70,000 x 25 pixels" in said
    assert "a side of a JPEG has at most 65,500" in said
    assert "room" not in said
    assert len(PackedSource(pack(source, tmp_path / "y.pack", JPEG, 0, on_bad_image="skip").path)) == 1


@pytest.mark.parametrize("end", [".part", ".part.index"])
def test_an_unfinished_pack_is_not_written_through_a_link(tree, tmp_path, end):
    (tmp_path / "other").write_text("mine")
    (tmp_path / f"new.pack{end}").symlink_to(tmp_path / "other")
    assert "new.pack could not be written" in refusal(pack, open_source(str(tree)), tmp_path / "new.pack", Recipe(), 0)
    assert (tmp_path / "other").read_text() == "mine"
    assert not (tmp_path / "new.pack").exists()
