"""Every kind of image file opens as upright 8-bit RGB, or fails with a short reason."""

import io
import struct
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.ranks import PREPARED
from PIL import Image
from torchvision.io import decode_jpeg

from data.augment import eval_transform
from data.image_files import image_extensions
from data.images import MAX_PIXELS, BadImage, decode_rgb, limit_pixels, most_pixels, open_rgb
from data.loader import EvaluationDataset, WorkerLoader, loader_options
from data.sources import ArraySource, FileSource, ImageSource


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def pixels(file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_rgb(file)
    assert image.mode == "RGB"
    return np.asarray(image)


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)


def test_extensions_are_those_of_torchvision_and_gif():
    assert {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".gif"} <= set(image_extensions())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_rgb_comes_back_unchanged(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert (pixels(saved(Image.fromarray(COLOURS), kind, **options)) == COLOURS).all()


def test_greyscale_becomes_three_equal_channels():
    opened = pixels(saved(Image.fromarray(RAMP), "PNG"))
    for channel in range(3):
        assert (opened[..., channel] == RAMP).all()


def test_alpha_is_dropped():
    la = Image.merge("LA", [Image.fromarray(RAMP), Image.new("L", (16, 16), 10)])
    assert (pixels(saved(la, "PNG")) == RAMP[..., None]).all()
    rgba = Image.fromarray(np.dstack([COLOURS, np.full((9, 7), 3, np.uint8)]))
    assert (pixels(saved(rgba, "PNG")) == COLOURS).all()


def test_one_bit():
    bits = np.arange(64).reshape(8, 8) % 3 == 0
    opened = pixels(saved(Image.fromarray(bits), "PNG"))
    assert (opened == np.where(bits, 255, 0)[..., None]).all()


def test_cmyk():
    # White, cyan, magenta, yellow and black ink by the textbook: channel = 255 - ink.
    ink = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255]]], np.uint8)
    opened = pixels(saved(Image.frombytes("CMYK", (5, 1), ink.tobytes()), "TIFF"))
    assert opened[0].tolist() == [[255] * 3, [0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]]
    jpeg = pixels(saved(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100))
    assert np.abs(jpeg.astype(int) - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("transparency", [None, 1, bytes([255, 0, 128])])
def test_palette_with_any_transparency_opens_without_warning(transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    options = {} if transparency is None else {"transparency": transparency}
    opened = pixels(saved(image, "PNG", **options))
    assert opened[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    opened = pixels(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert opened.reshape(-1, 3).tolist() == [[255, 0, 0]] * 16


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(mode, kind):
    if mode != "I;16" and kind == "PNG":
        pytest.skip("Pillow writes no such PNG")
    values = RAMP.astype(np.uint16) * 257  # the 8-bit ramp at 16 bits
    order = {"I;16": "<u2", "I;16B": ">u2", "I": "=i4"}[mode]
    image = Image.frombytes(mode, (16, 16), values.astype(order).tobytes())
    assert (pixels(saved(image, kind)) == RAMP[..., None]).all()


def test_dark_sixteen_bit_image_stays_dark():
    image = Image.frombytes("I;16", (2, 1), np.array([200, 100], "<u2").tobytes())
    assert pixels(saved(image, "PNG")).max() == 1


def test_sixteen_bit_pgm():
    values = RAMP.astype(">u2") * 257
    assert (pixels(io.BytesIO(b"P5 16 16 65535\n" + values.astype(">u2").tobytes())) == RAMP[..., None]).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([0.0, 257.0 * 7, 65535.0], [0, 7, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, float("nan"), 1.0], [0, 0, 255]),
        ([3.0, 3.0, 3.0], [3, 3, 3]),
    ],
)
def test_float_images(values, expected):
    image = Image.fromarray(np.array([values], np.float32))
    opened = pixels(saved(image, "TIFF"))[0, :, 0].astype(int)
    assert np.abs(opened - expected).max() <= (1 if 128 in expected else 0)


def test_integer_images_outside_16_bits_are_stretched():
    image = Image.fromarray(np.array([[-5, 0, 5]], np.int32))
    assert pixels(saved(image, "TIFF"))[0, :, 0].tolist() in ([0, 128, 255], [0, 127, 255])
    image = Image.fromarray(np.array([[0, 200, 255]], np.int32))
    assert pixels(saved(image, "TIFF"))[0, :, 0].tolist() == [0, 200, 255]


ROTATIONS = {1: 0, 3: 2, 6: 3, 8: 1}  # EXIF orientation -> quarter turns to the left that put it upright


@pytest.mark.parametrize("orientation", ROTATIONS)
def test_exif_rotation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = pixels(saved(Image.fromarray(COLOURS), "PNG", exif=exif))
    assert (opened == np.rot90(COLOURS, ROTATIONS[orientation])).all()


def test_exif_mirror_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 2
    assert (pixels(saved(Image.fromarray(COLOURS), "PNG", exif=exif)) == COLOURS[:, ::-1]).all()


def test_damaged_exif_is_no_reason_to_refuse():
    garbage = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00garbage"
    opened = pixels(saved(Image.new("RGB", (8, 8), "white"), "JPEG", exif=garbage))
    assert opened.shape == (8, 8, 3)


def reason(file):
    with pytest.raises(BadImage) as caught:
        open_rgb(file)
    text = str(caught.value)
    assert text
    assert "\n" not in text
    assert len(text) <= 200
    assert "0x" not in text
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    return text


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_files(kind, share):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(noise), kind).getvalue()
    reason(io.BytesIO(whole[: int(len(whole) * share)]))


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", bytes(1000)])
def test_not_images(content):
    assert "Pillow" in reason(io.BytesIO(content)) or content


def test_corrupt_png_chunk():
    whole = bytearray(saved(Image.fromarray(COLOURS), "PNG").getvalue())
    whole[40:60] = bytes(20)
    reason(io.BytesIO(bytes(whole)))


def test_missing_file_and_folder(tmp_path):
    assert reason(tmp_path / "gone.jpg") == "No such file or directory"
    assert "irectory" in reason(tmp_path)


def test_decompression_bomb():
    header = struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54)
    header += struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0)
    assert "pixels" in reason(io.BytesIO(header))


@pytest.mark.parametrize("error", [OSError("x"), SyntaxError("a\nb"), ValueError(), struct.error("s"), KeyError(1)])
def test_any_decoder_error_is_a_bad_image(monkeypatch, error):
    def fail(file):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    reason("any.jpg")


def test_file_paths_and_open_files_both_work(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    assert (pixels(tmp_path / "a.png") == COLOURS).all()
    assert (pixels(str(tmp_path / "a.png")) == COLOURS).all()
    with (tmp_path / "a.png").open("rb") as file:
        assert (pixels(file) == COLOURS).all()
        assert not file.closed


# ---- decode_rgb gives what open_rgb gives


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
