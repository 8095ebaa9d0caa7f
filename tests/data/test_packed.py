"""The packed file: what goes in comes out, in order, under its name and in any worker."""

import io
import json
import pickle
import zlib

import numpy as np
import pytest
import torch
from helpers.packs import JPEG, RAW, refusal
from helpers.ranks import PREPARED
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data import packing
from data.datasets import open_source
from data.packed import HEADER, RECORD, PackedSource
from data.packing import pack
from data.packing_part import Recipe
from data.sources import ArraySource
from data.splits import open_labelled

# ---- what goes in comes out


def original_size(source, i):
    record = source.records[i]
    return int(record["width"]), int(record["height"])


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
