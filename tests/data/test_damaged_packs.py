"""Each kind of damage to a packed file, and what another hand could write, is refused or named."""

import errno
import itertools
import json

import numpy as np
import pytest
from helpers.packs import JPEG, RAW, refusal
from PIL import Image

import data.packed as data_packed
from data.datasets import open_source
from data.images import BadImage
from data.packed import HEADER, HEADER_SIZE, RECORD, PackedSource, digest_of, pack_header
from data.packing import pack
from data.packing_part import Recipe

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
