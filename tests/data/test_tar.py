"""Tars: an archived tree has the folder's names, order and classes; WebDataset shards their own."""

import contextlib
import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from data.datasets import open_source
from data.packed import PackedSource
from data.packing import pack
from data.packing_part import Recipe
from data.tar import TarSource
from runtime.errors import UserError

TREE = ["b/2.png", "b/10.png", "b/1.JPG", "B/x.png", "a/deep/er/z.png", "a/deep/a.png", "a/deep-er/q.png", "a/y.png",
        "a/Y.png", "c/notes.txt", "été/ü.png", ".hidden/no.png", "a/.hidden/no.png"]
FLAT = ["b.png", "a.png", "sub/z.png", "a.d/q.png", "10.png", "9.png"]


def content(number):
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tree(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content(number))
    return folder


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def refusal(path):
    with pytest.raises(UserError) as caught:
        TarSource([path])
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("names", [TREE, FLAT, ["x/0.png", "y/0.png"], ["0.png"]])
@pytest.mark.parametrize("arcname", [".", "top", "top/train"])
def test_a_tar_of_a_folder_is_the_folder(tmp_path, names, arcname):
    folder = write_tree(tmp_path / "t", names)
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(folder, arcname)
    expected, source = open_source(str(folder)), TarSource([tmp_path / "t.tar"])
    assert list(source.names) == list(expected.names)
    assert source.classes == expected.classes
    assert (source.labels is None) == (expected.labels is None)
    assert source.labels is None or source.labels.tolist() == expected.labels.tolist()
    assert [source.encoded(i) for i in range(len(source))] == [expected.encoded(i) for i in range(len(source))]
    assert np.array_equal(source.open(0), expected.open(0))
    assert source.take(np.array([len(source) - 1])).encoded(0) == expected.encoded(len(source) - 1)
    pack(source, tmp_path / "t.pack", Recipe(), 2)
    assert PackedSource(tmp_path / "t.pack").fingerprint() == expected.fingerprint()


def shard(path, keys, labels):
    members = []
    for key, label in zip(keys, labels, strict=True):
        members += [(f"{key}.seg.jpg", content(label)), (f"{key}.json", b"{}")]
        members += [(f"{key}.cls", str(label).encode() + b"\n")] if label is not None else []
    return write_tar(path, members)


def test_webdataset_shards(tmp_path):
    paths = [shard(tmp_path / "s-0.tar", ["9", "1"], [2, 0]), shard(tmp_path / "s-1.tar", ["9"], [1])]
    one, two = TarSource(paths[:1]), TarSource(paths)
    assert list(one.names) == ["9.seg.jpg", "1.seg.jpg"]
    assert list(two.names) == ["s-0/9.seg.jpg", "s-0/1.seg.jpg", "s-1/9.seg.jpg"]
    assert two.labels.tolist() == [2, 0, 1]
    assert two.classes == ["0", "1", "2"]
    assert [two.open(i).getpixel((0, 0))[0] for i in range(3)] == [2, 0, 1]
    assert two.location(2) == f"{paths[1]}: s-1/9.seg.jpg"


def test_refusals(tmp_path):
    path = tmp_path / "x.tar"
    assert "uncompressed tar" in refusal(path)
    path.write_bytes(b"no tar at all" * 100)
    assert "uncompressed tar" in refusal(path)
    write_tar(path, [("a/0.png", content(0))], "w:gz")
    assert "decompress" in refusal(path)
    write_tar(path, [("a/notes.txt", b"x")])
    assert "contains no images" in refusal(path)
    write_tar(path, [("a.jpg", content(0)), ("a.cls", b"cat")])
    assert "a.cls holds b'cat', expected a class number" in refusal(path)
    write_tar(path, [("a.jpg", content(0)), ("a.cls", b"0"), ("b.jpg", content(1))])
    assert "b.jpg has no b.cls" in refusal(path)
    write_tar(path, [("a/0.png", content(0) + bytes(5000))])
    path.write_bytes(path.read_bytes()[:3000])
    refusal(path)
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("a/0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "b.png"
        tar.addfile(link)
    assert "is a link" in refusal(path)


def test_a_tar_as_data_is_sent_to_the_packer(tmp_path):
    write_tar(tmp_path / "x.tar", [("a/0.png", content(0))])
    with pytest.raises(UserError, match="pack_dataset.py --data"):
        open_source(str(tmp_path / "x.tar"))


def test_absolute_and_relative_members(tmp_path):
    """As tar extracts them: without the leading slash."""
    members = [("/x/a/0.png", content(0)), ("x/b/1.png", content(1)), ("./x/a/2.png", content(2))]
    source = TarSource([write_tar(tmp_path / "t.tar", members)])
    assert list(source.names) == ["a/0.png", "a/2.png", "b/1.png"]
    assert source.labels.tolist() == [0, 0, 1]
    cached = TarSource([write_tar(tmp_path / "h.tar", [(f"/root/.cache/{name}", data) for name, data in members])])
    assert len(cached) == 3


def test_what_a_mac_adds_is_left_out(tmp_path):
    members = [("x/a/0.png", content(0)), ("x/a/._0.png", b"resource"), ("__MACOSX/x/a/._0.png", b"resource"),
               ("x/b/1.png", content(1)), ("x/b/2.heic", b"heic")]
    source = TarSource([write_tar(tmp_path / "t.tar", members)])
    assert (list(source.names), source.classes) == (["a/0.png", "b/1.png"], ["a", "b"])
    assert "skipped: 2 hidden files" in source.description
    assert "cannot read (.heic)" in source.description
    mixed = TarSource([write_tar(tmp_path / "m.tar", [*members, ("x/stray.png", content(3))])])
    assert "stray.png lies beside the folders a/, b/" in mixed.description
    with pytest.raises(UserError, match="takes a fraction of each class"):
        mixed.subset(0.5)


@pytest.mark.parametrize("record", [b"x path=a.png\n", b"11 size=-5\n\n", b"99999 path=\xff\n",
                                    b"20 GNU.sparse.major=x\n"])
def test_a_broken_pax_header(tmp_path, record):
    head = tarfile.TarInfo("pax")
    head.type, head.size = tarfile.XHDTYPE, len(record)
    path = write_tar(tmp_path / "good.tar", [("a/0.png", content(0))])
    (tmp_path / "t.tar").write_bytes(head.tobuf() + record.ljust(512, b"\0") + path.read_bytes())
    with contextlib.suppress(UserError):  # and nothing else; some versions of Python pass over some of them
        assert list(TarSource([tmp_path / "t.tar"]).names) == ["0.png"]


@pytest.mark.parametrize("number", [b"9" * 5000, b"9" * 20, b"-1", b"10000000", b"", b"x"])
def test_class_numbers_have_limits(tmp_path, number):
    path = write_tar(tmp_path / "t.tar", [("0.png", content(0)), ("0.cls", number)])
    assert "0.cls holds" in refusal(path)


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "t.tar")
    assert "not a regular file" in refusal(tmp_path / "t.tar")
