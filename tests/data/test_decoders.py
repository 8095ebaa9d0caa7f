"""The quick decoders give what Pillow gives, for whole files and damaged ones, within the limit of pixels."""

import io
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.images import saved
from helpers.ranks import PREPARED
from PIL import Image
from torchvision.io import decode_jpeg

from data.augment import eval_transform
from data.images import MAX_PIXELS, BadImage, decode_rgb, limit_pixels, most_pixels, open_rgb
from data.loader import EvaluationDataset, WorkerLoader, loader_options
from data.sources import ArraySource, FileSource, ImageSource


def outcome(decode):
    """The pixels, or the reason."""
    try:
        return np.asarray(decode())
    except BadImage as error:
        return str(error)


def check_same(data, off=0.0):
    """off: how far the pixels may be apart on average."""
    expected = outcome(lambda: open_rgb(io.BytesIO(data)))
    got = outcome(lambda: decode_rgb(data).permute(1, 2, 0).numpy())
    assert type(got) is type(expected), (got, expected)
    if off and isinstance(got, np.ndarray):
        assert got.shape == expected.shape
        assert np.abs(got.astype(int) - expected).mean() < off
    else:
        assert np.array_equal(got, expected)
    return expected


SCENE = Image.fromarray(np.stack([np.add.outer(np.arange(40) * a, np.arange(53) * b) % 256 for a, b in
                                  ((2, 3), (5, 1), (1, 4))], -1).astype(np.uint8))


@pytest.fixture(params=["simplejpeg", "torchvision"])
def decoders(request, monkeypatch):
    """How often the decoder beside Pillow's was asked."""
    asked = []

    def counting(decode):
        def counted(*arguments, **options):
            asked.append(1)
            return decode(*arguments, **options)
        return counted

    if request.param == "simplejpeg":
        simplejpeg = pytest.importorskip("simplejpeg", reason="simplejpeg is not installed")
        monkeypatch.setattr("data.images.simplejpeg", SimpleNamespace(decode_jpeg=counting(simplejpeg.decode_jpeg)))
    else:
        monkeypatch.setattr("data.images.simplejpeg", None)
        monkeypatch.setattr("data.images.decode_jpeg", counting(decode_jpeg))
    return asked


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 20, "subsampling": 2},
                                     {"quality": 95, "subsampling": 0}, {"optimize": True, "dpi": (300, 300)},
                                     {"comment": b"hello"}, {"icc_profile": b"x" * 5000}], ids=str)
def test_plain_jpegs_are_decoded_without_pillow_to_the_same_pixels(mode, options, decoders):
    check_same(saved(SCENE.convert(mode), "JPEG", **options).getvalue())
    assert decoders


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("order", ["<", ">"])
def test_exif(orientation, order, decoders):
    exif = Image.Exif()
    exif.endian = order
    exif[0x010F] = "camera"
    if orientation != 9:
        exif[0x0112] = orientation
    shown = check_same(saved(SCENE, "JPEG", exif=exif).getvalue())
    assert shown.shape == ((53, 40, 3) if 5 <= orientation <= 8 else (40, 53, 3))
    assert bool(decoders) is (orientation in (1, 9))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0nonsense"])
def test_damaged_exif(exif):
    check_same(saved(SCENE, "JPEG", exif=exif).getvalue())


def test_four_channels_are_pillows(decoders):
    check_same(saved(SCENE.convert("CMYK"), "JPEG").getvalue())
    assert not decoders


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_other_formats(kind, mode):
    check_same(saved(SCENE.convert(mode), kind).getvalue())


def test_other_pngs():
    deep = Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30))
    for image in (SCENE.convert("RGBA"), SCENE.convert("LA"), deep):
        check_same(saved(image, "PNG").getvalue())


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8" + b"\xff" * 50, b"words" * 9,
                                  b"\xff\xd8\xff\xe0\0\0" * 5, b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image(data):
    assert isinstance(check_same(data), str)


def test_without_either_decoder(monkeypatch):
    data = saved(SCENE, "JPEG").getvalue()
    expected = check_same(data)
    monkeypatch.setattr("data.images.simplejpeg", None)
    monkeypatch.setattr("data.images.decode_jpeg", None)
    assert np.array_equal(check_same(data), expected)


def test_damaged_jpegs_end_alike(decoders):
    generator, reasons = np.random.default_rng(0), set()
    for options in ({}, {"progressive": True}):
        whole = saved(SCENE, "JPEG", **options).getvalue()
        for _ in range(120):
            data = bytearray(whole)
            if generator.random() < 0.5:
                del data[generator.integers(2, len(data)) :]
            else:
                for place in generator.integers(2, len(data), 4):
                    data[place] = generator.integers(0, 256)
            # What damage takes from a progressive file is filled smoothly, in libjpeg-turbo before 2.1 otherwise.
            reasons.add(type(check_same(bytes(data), 1.0 if options else 0.0)))
    assert reasons == {str, np.ndarray}


@pytest.fixture
def any_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # what a test changes is put back


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF"])
def test_the_most_pixels_of_an_image(any_limit, kind, decoders):
    data = saved(SCENE, kind).getvalue()
    limit_pixels(53 * 40)
    assert decode_rgb(data).shape == (3, 40, 53)
    assert open_rgb(io.BytesIO(data)).size == (53, 40)
    del decoders[:]
    limit_pixels(53 * 40 - 1)
    assert check_same(data) == ("its 2,120 pixels are more than --max-pixels 2119 allows; raise that if you trust the "
                                "image")
    assert not decoders


def test_the_most_pixels_by_default(any_limit):
    limit_pixels(MAX_PIXELS)
    assert most_pixels() == MAX_PIXELS == 178_956_970
    header = saved(Image.new("1", (8, 8)), "PNG").getvalue()
    beyond = "its 225,000,000 pixels are more than --max-pixels 178956970"
    for width, words in ((12_000, "truncated"), (15_000, beyond)):
        start = header[:16] + struct.pack(">II", width, width) + header[24:29]
        start += struct.pack(">I", zlib.crc32(start[12:29]))
        with pytest.raises(BadImage, match=words):
            open_rgb(io.BytesIO(start + header[33:33 + 12]))


def test_workers_of_any_kind_know_the_limit(any_limit, tmp_path):
    SCENE.save(tmp_path / "a.png")
    source = FileSource(tmp_path, ["a.png"], None, [], "some")
    limit_pixels(53 * 40 - 1)
    for kind in ("fork", PREPARED):
        loader = WorkerLoader(EvaluationDataset(source, eval_transform(32)), batch_size=1, multiprocessing_context=kind,
                              **loader_options(1, "cpu", persistent=False))
        (batch,) = loader
        assert "more than --max-pixels 2119 allows" in batch.bad[0][1]


# ---- what a source gives


def test_files_give_their_content_and_pixels(tmp_path):
    data = saved(SCENE, "JPEG").getvalue()
    (tmp_path / "a.jpg").write_bytes(data)
    (tmp_path / "b.jpg").write_bytes(data[:200])
    (tmp_path / "d.jpg").mkdir()
    source = FileSource(tmp_path, ["a.jpg", "b.jpg", "c.jpg", "d.jpg"], None, [], "some")
    assert source.encoded(0) == data
    assert np.array_equal(source.pixels(0).permute(1, 2, 0), source.open(0))
    for i in range(1, 4):
        assert outcome(lambda i=i: source.pixels(i)) == outcome(lambda i=i: source.open(i))
    for i in (2, 3):
        with pytest.raises(BadImage):
            source.encoded(i)


def test_images_in_memory_have_no_file():
    images = np.stack([np.asarray(SCENE), np.asarray(SCENE)[::-1]])
    images.flags.writeable = False
    source = ArraySource(images, None, [], "array")
    assert source.encoded(1) is None
    pixels = source.pixels(1)
    assert np.array_equal(pixels.permute(1, 2, 0), source.open(1))
    pixels.zero_()
    assert images[1].any()
    assert np.array_equal(ImageSource.pixels(source, 0).permute(1, 2, 0), source.open(0))
