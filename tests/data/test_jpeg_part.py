"""A part of a JPEG: the pixels of the whole one, and the same end for damaged files."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from data import images, jpeg_part
from data.augment import augmentation
from data.images import BadImage, decode_crops, decode_rgb
from data.loader import ViewDataset
from data.sources import FileSource

needs_library = pytest.mark.skipif(jpeg_part.library() is None, reason="libturbojpeg 3 is not installed")
KINDS = [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"subsampling": "4:1:1"},
         {"subsampling": 2, "progressive": True}, {"subsampling": 2, "restart_marker_rows": 1}]


def jpeg(height, width, mode="RGB", **options):
    noise = np.random.default_rng(height + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def random_boxes(generator, count, height, width):
    size = np.stack([generator.integers(1, side + 1, count) for side in (height, width)], 1)
    size = np.where(generator.random((count, 2)) < 0.3, np.minimum(size, 3), size)
    corner = (generator.random((count, 2)) * (np.array((height, width)) - size + 1)).astype(np.int64)
    return np.concatenate([corner, size], 1)


def cut(pixels, box):
    top, left, height, width = box.tolist()
    return pixels[:, top : top + height, left : left + width]


@needs_library
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_crops_of_a_part_are_those_of_the_whole(options, mode):
    generator, parts = np.random.default_rng(0), 0
    for height, width in ((1, 1), (16, 16), (40, 53), (130, 65)):
        data = jpeg(height, width, mode, **options)
        whole = decode_rgb(data)
        for boxes in random_boxes(generator, 60, height, width).reshape(20, 3, 4):
            one = boxes[:1]
            for wanted in (one, boxes):
                pixels, inside = decode_crops(data, lambda *size, wanted=wanted: wanted)
                parts += pixels.numel() < whole.numel()
                for box, shifted in zip(wanted, inside, strict=True):
                    assert torch.equal(cut(pixels, shifted), cut(whole, box)), (height, width, box)
    assert parts > 30


def end_of(decode, *arguments):
    try:
        return decode(*arguments)
    except BadImage as error:
        return str(error)


def last_rows(height, width):
    """A crop of the last 8 rows, without some of the columns."""
    return np.array([[max(0, height - 8), width // 3, min(8, height), width // 2]])


@needs_library
def test_damaged_jpegs_end_as_the_whole_does():
    """These crops reach the last row: damage below all crops is not seen."""
    generator, ends = np.random.default_rng(0), set()
    for options in ({"subsampling": 2}, {"progressive": True}):
        good = jpeg(48, 60, **options)
        for _ in range(100):
            data = bytearray(good)
            if generator.random() < 0.5:
                del data[generator.integers(2, len(data)) :]
            else:
                for place in generator.integers(2, len(data), 4):
                    data[place] = generator.integers(0, 256)
            damaged = bytes(data)
            whole, part = end_of(decode_rgb, damaged), end_of(decode_crops, damaged, last_rows)
            ends.add(type(whole))
            if isinstance(whole, str):
                assert part == whole
            else:
                assert torch.equal(cut(part[0], part[1][0]), cut(whole, last_rows(*whole.shape[1:])[0]))
    assert ends == {str, torch.Tensor}


@needs_library
def test_a_truncated_file_is_reported_wherever_the_crop_lies():
    data = jpeg(64, 64)
    with pytest.raises(BadImage):
        decode_crops(data[: len(data) * 9 // 10], lambda height, width: np.array([[0, 0, 8, 8]]))


def test_without_the_library_or_for_other_files_the_whole_is_decoded(monkeypatch):
    monkeypatch.setattr(jpeg_part, "library", lambda: None)
    pixels, boxes = decode_crops(jpeg(40, 53), lambda height, width: np.array([[1, 2, 3, 4]]))
    assert (pixels.shape, boxes.tolist()) == ((3, 40, 53), [[1, 2, 3, 4]])
    file = io.BytesIO()
    Image.new("RGB", (7, 5)).save(file, "PNG")
    assert decode_crops(file.getvalue(), lambda height, width: np.array([[0, 0, height, width]]))[1].tolist() == [
        [0, 0, 5, 7]]


@needs_library
def test_views_are_the_same_with_and_without(tmp_path, monkeypatch):
    """Several views of images that stand several times in the batch."""
    for i, options in enumerate(KINDS):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(60 + i, 90, **options))
    source = FileSource(tmp_path, [f"{i}.jpg" for i in range(len(KINDS))], None, [], "test")
    dataset = ViewDataset(source, [augmentation("moco_v2", 24), augmentation("swav", 16)], 0, "fast", True)
    keys = [(i % len(KINDS), stamp) for stamp, i in enumerate(range(2 * len(KINDS)))]
    decoded = []
    monkeypatch.setattr(images, "decode_part",
                        lambda data, choose: decoded.append(jpeg_part.decode_part(data, choose)) or decoded[-1])
    by_parts = dataset.__getitems__(keys)
    assert len(decoded) == by_parts.decoded == len(KINDS)
    assert any(part[0].shape[1:] != (60 + i, 90) for i, part in enumerate(decoded))
    monkeypatch.setattr(jpeg_part, "library", lambda: None)
    whole = dataset.__getitems__(keys)
    assert all(torch.equal(*pair) for pair in zip(by_parts.views, whole.views, strict=True))
