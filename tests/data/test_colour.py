"""At equal parameters the pixels are Pillow's: image by image, every operation alone and all together, both ways."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from data import colour
from data.augment import COLOUR, JITTER_ORDERS, NO_COLOUR, PRESETS, Augmentation, view_keys
from data.colour import apply_colour, colour_batch, colour_image
from data.views import pil_colour

COUNT = 24
TOLERANCE = 1.5  # of 255, the mean over an image
RANDOM = np.random.default_rng(0)


def pictures(size):
    """Smooth colours, edges, noise, greys, black and white."""
    y, x = np.mgrid[:size, :size] / size
    images = []
    for i in range(COUNT):
        a, b, c = RANDOM.uniform(-3, 3, 3)
        waves = np.stack([np.sin(6 * (a * x + b * y) + k * c) for k in range(3)], -1)
        image = 127.5 + 127.5 * (np.sign(waves) if i % 4 == 1 else waves)
        if i % 4 == 2:
            image = image + RANDOM.normal(0, 30, image.shape)
        if i % 4 == 3:
            image = image[..., :1].repeat(3, -1)
        images.append(np.clip(image, 0, 255).astype(np.uint8))
    images[0][:], images[4][:] = 0, 255
    return np.stack(images)


IMAGES = {size: pictures(size) for size in (16, 33, 160)}


def parameters(**columns):
    rows = np.tile(np.array(NO_COLOUR, np.float32), (COUNT, 1))
    for name, values in columns.items():
        rows[:, COLOUR.index(name)] = values
    return rows


def both(images, rows):
    """The two ways to the same result, float64 [2, n, H, W, 3]."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    before = x.clone()
    ways = [torch.stack([colour_image(image, row.tolist()) for image, row in zip(x, rows, strict=True)]),
            colour_batch(x, torch.from_numpy(rows))]
    assert torch.equal(x, before)
    assert all(way.dtype == torch.uint8 and way.shape == x.shape for way in ways)
    return torch.stack(ways).permute(0, 1, 3, 4, 2).double().numpy()


def check(images, rows, oracle, mean=TOLERANCE):
    """oracle(PIL image, row) -> PIL image."""
    expected = np.stack([np.asarray(oracle(Image.fromarray(image), row)) for image, row in
                         zip(images, rows, strict=True)]).astype(float)
    error = np.abs(both(images, rows) - expected).mean((2, 3, 4))  # [2, n]
    assert error.max() < mean, error.max(1)
    return expected


def turn_hue(image, factor):
    h, s, v = image.convert("HSV").split()
    h = Image.fromarray(((np.asarray(h).astype(int) + int(factor * 255)) % 256).astype(np.uint8))
    return Image.merge("HSV", (h, s, v)).convert("RGB")


ONE = {
    "brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "saturation": lambda image, v: ImageEnhance.Color(image).enhance(v),
    "hue": turn_hue,
}


@pytest.mark.parametrize("size", IMAGES)
@pytest.mark.parametrize("name", ONE)
def test_one_part_of_the_jitter(size, name):
    low, high = (-0.5, 0.5) if name == "hue" else (0.0, 2.5)
    values = RANDOM.uniform(low, high, COUNT).astype(np.float32)
    values[:3] = low, high, 0.5 * (low + high)
    rows = parameters(**{name: values, "order": np.arange(COUNT)})

    def oracle(image, row):  # the hue's round trip through 8 bits belongs to the jitter even at 0
        after = ONE[name](image, row[COLOUR.index(name)].item())
        return after if name == "hue" else turn_hue(after, 0) if _hue_last(row, name) else ONE[name](
            turn_hue(image, 0), row[COLOUR.index(name)].item())

    expected = check(IMAGES[size], rows, oracle, mean=0.3)
    assert np.abs(expected - IMAGES[size]).mean() > 3  # there was something to get wrong


def _hue_last(row, name):
    order = [COLOUR[column] for column in JITTER_ORDERS[int(row[COLOUR.index("order")])]]
    return order.index("hue") > order.index(name)


@pytest.mark.parametrize("when", [1, 2])
def test_grey(when):
    expected = check(IMAGES[33], parameters(grey=when), lambda image, row: image.convert("L").convert("RGB"), 1e-9)
    assert (expected[..., :1] == expected).all()


@pytest.mark.parametrize("size", IMAGES)
@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9, 1.3, 2.0, 4.0])
def test_blur(size, sigma):
    rows = parameters(sigma=sigma * RANDOM.uniform(0.7, 1, COUNT))
    check(IMAGES[size], rows, lambda image, row: image.filter(ImageFilter.GaussianBlur(row[6].item())), mean=0.1)


def test_blur_of_some_images_leaves_the_others_alone():
    rows = parameters(sigma=np.arange(COUNT) % 2 * 1.5)
    for way in both(IMAGES[33], rows):
        assert (way[::2] == IMAGES[33][::2]).all()
        assert (way[11] != IMAGES[33][11]).any()


def test_solarize():
    rows = parameters(solarize=np.where(np.arange(COUNT) % 3, 128, 256))
    check(IMAGES[33], rows, lambda image, row: ImageOps.solarize(image, 128) if row[7] < 256 else image, 1e-9)


def test_no_colour_changes_nothing():
    for way in both(IMAGES[33], parameters()):
        assert (way == IMAGES[33]).all()


@pytest.mark.parametrize("order", range(24))
def test_the_order_of_the_jitter(order):
    values = {name: RANDOM.uniform(*((-0.4, 0.4) if name == "hue" else (0.5, 1.6)), COUNT) for name in ONE}
    rows = parameters(order=order, **values)

    def oracle(image, row):
        for column in JITTER_ORDERS[order]:
            image = ONE[COLOUR[column]](image, row[column].item())
        return image

    expected = check(IMAGES[16], rows, oracle, mean=0.3)
    other = both(IMAGES[16], np.where(np.arange(8) == 4, (order + 7) % 24, rows).astype(np.float32))
    assert np.abs(other - expected).mean() > 1  # another order is another picture


@pytest.mark.parametrize("size", IMAGES)
@pytest.mark.parametrize("name", [*PRESETS, "all"])
def test_presets(size, name):
    preset = PRESETS.get(name) or PRESETS["moco_v2"].__class__(
        (0.2, 1), (0.8, 0.8, 0.8, 0.5), 0.9, 0.7, grayscale_probability=0.3, solarize_probability=0.5)
    rows = Augmentation(preset, 224).draw(view_keys(3, np.arange(COUNT), 0)).colour
    check(IMAGES[size], rows, pil_colour)
    applied = apply_colour(torch.from_numpy(IMAGES[size]).permute(0, 3, 1, 2), torch.from_numpy(rows))
    assert np.abs(applied.permute(0, 2, 3, 1).numpy() - both(IMAGES[size], rows)[0]).mean() < 1


def test_the_oracle_follows_the_originals_order():
    rows = parameters(brightness=1.3, contrast=0.7, saturation=1.4, hue=0.2, order=5, sigma=1.5, solarize=128)
    for grey in (0, 1, 2):
        row = rows[0].copy()
        row[5] = grey
        image = expected = Image.fromarray(IMAGES[33][6])
        if grey == 1:
            expected = expected.convert("L").convert("RGB")
        for column in JITTER_ORDERS[5]:
            expected = ONE[COLOUR[column]](expected, row[column].item())
        if grey == 2:
            expected = expected.convert("L").convert("RGB")
        expected = ImageOps.solarize(expected.filter(ImageFilter.GaussianBlur(1.5)), 128)
        assert np.array_equal(np.asarray(pil_colour(image, row)), np.asarray(expected))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_card():
    rows = torch.from_numpy(Augmentation(PRESETS["moco_v2"], 224).draw(view_keys(3, np.arange(COUNT), 0)).colour)
    images = torch.from_numpy(IMAGES[160]).permute(0, 3, 1, 2)
    there = apply_colour(images.cuda(), rows)
    assert there.is_cuda
    assert (there.cpu().double() - colour_batch(images, rows).double()).abs().mean((1, 2, 3)).max() < 0.1


def test_a_batch_is_one_graph_of_the_same_pixels(monkeypatch):
    """Without a compiler: traced whole, and run as traced."""
    rows = Augmentation(PRESETS["moco_v2"], 16).draw(view_keys(0, np.arange(COUNT), 0)).colour
    rows[::5, COLOUR.index("solarize")] = 128
    images, rows = torch.from_numpy(IMAGES[16]).permute(0, 3, 1, 2), torch.from_numpy(rows)
    traced = torch.compile(colour._colour, backend="eager", fullgraph=True)
    monkeypatch.setattr(colour, "_compiled", lambda: traced)
    assert torch.equal(colour_batch(images, rows, compiled=True), colour_batch(images, rows))
