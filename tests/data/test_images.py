"""Every kind of image file opens as upright 8-bit RGB, or fails with a short reason."""

import io
import struct
import warnings

import numpy as np
import pytest
from helpers.images import saved
from PIL import Image

from data.image_files import image_extensions
from data.images import BadImage, open_rgb


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
