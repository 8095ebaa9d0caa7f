"""Presets hold the original's parameters; parameters are drawn as torchvision draws them, and from the key alone."""

import dataclasses
import resource

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from data.augment import (
    BRIGHTNESS,
    CONTRAST,
    GREY,
    HUE,
    JITTER_ORDERS,
    ORDER,
    PRESETS,
    SATURATION,
    SIGMA,
    SOLARIZE,
    Augmentation,
    CentreCrop,
    augmentation,
    eval_transform,
    eval_transform_name,
    view_keys,
)
from runtime.errors import UserError

NAMES = ["moco_v1", "moco_v2", "swav", "simclr"]
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
MANY = 20_000


def draw(name="moco_v2", count=MANY, seed=0, view=0, size=224, **changes):
    drawn = Augmentation(dataclasses.replace(PRESETS[name], **changes), size)
    return drawn.draw(view_keys(seed, np.arange(count), view))


def distance(a, b):
    """Kolmogorov and Smirnov's: the largest difference of the two distribution functions."""
    a, b = np.sort(a), np.sort(b)
    points = np.concatenate([a, b])
    share_a, share_b = (np.searchsorted(x, points, side="right") / len(x) for x in (a, b))
    return np.abs(share_a - share_b).max()


def test_presets_are_the_originals():
    assert set(PRESETS) == set(NAMES)
    assert PRESETS["moco_v1"] == PRESETS["simclr"]
    for name, low in (("moco_v2", 0.2), ("swav", 0.14)):
        preset = PRESETS[name]
        assert preset.crop_scale == (low, 1.0)
        assert (preset.jitter, preset.jitter_probability) == ((0.4, 0.4, 0.4, 0.1), 0.8)
        assert (preset.blur_probability, preset.blur_radius) == (0.5, (0.1, 2.0))
        assert (preset.grayscale_probability, preset.grayscale_first) == (0.2, False)
    preset = PRESETS["moco_v1"]
    assert (preset.crop_scale, preset.jitter, preset.jitter_probability) == ((0.2, 1), (0.4, 0.4, 0.4, 0.4), 1)
    assert (preset.blur_probability, preset.grayscale_probability, preset.grayscale_first) == (0, 0.2, True)
    assert all(x.flip_probability == 0.5 and x.solarize_probability == 0 for x in PRESETS.values())
    with pytest.raises(AttributeError):
        PRESETS["swav"].crop_scale = (0.5, 1)


# ---- the distribution


@pytest.mark.parametrize("shape", [(375, 500), (32, 32), (40, 300), (300, 40), (3, 2)])
@pytest.mark.parametrize("low", [0.2, 0.08])
def test_crops_are_distributed_as_torchvisions(shape, low):
    count = 4000
    expected = np.array([transforms.RandomResizedCrop.get_params(torch.empty(3, *shape), [low, 1.0], [3 / 4, 4 / 3])
                         for _ in range(count)])
    boxes = draw(count=count, crop_scale=(low, 1.0)).boxes(*shape)
    assert boxes.dtype == np.int64
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= shape).all()
    bound = 1.95 * np.sqrt(2 / count)  # exceeded once in a thousand
    for column in range(4):
        assert distance(expected[:, column], boxes[:, column]) < bound
    assert distance(expected[:, 2] / expected[:, 3], boxes[:, 2] / boxes[:, 3]) < bound
    assert distance(expected[:, 2] * expected[:, 3], boxes[:, 2] * boxes[:, 3]) < bound


def test_a_picture_that_no_crop_fits_gives_its_middle():
    shape = (1000, 4)
    expected = transforms.RandomResizedCrop.get_params(torch.empty(3, *shape), [0.9, 1.0], [3 / 4, 4 / 3])
    assert draw(count=50, crop_scale=(0.9, 1.0)).boxes(*shape).tolist() == [list(expected)] * 50
    expected = transforms.RandomResizedCrop.get_params(torch.empty(3, *shape[::-1]), [0.9, 1.0], [3 / 4, 4 / 3])
    assert draw(count=50, crop_scale=(0.9, 1.0)).boxes(*shape[::-1]).tolist() == [list(expected)] * 50


def test_boxes_of_some_rows():
    drawn = draw(count=20)
    assert (drawn.boxes(90, 70, [3, 17]) == drawn.boxes(90, 70)[[3, 17]]).all()


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2"])
def test_jitter_is_distributed_as_torchvisions(name):
    jitter = PRESETS[name].jitter
    expected = transforms.ColorJitter(*jitter)
    ranges = expected.brightness, expected.contrast, expected.saturation, expected.hue
    params = [transforms.ColorJitter.get_params(*ranges) for _ in range(4000)]
    colour = draw(name).colour
    assert colour.dtype == np.float32
    on = colour[colour[:, ORDER] >= 0]
    assert len(on) / MANY == pytest.approx(PRESETS[name].jitter_probability, abs=0.015)
    for column, key in ((BRIGHTNESS, 1), (CONTRAST, 2), (SATURATION, 3), (HUE, 4)):
        assert distance(on[:, column], np.array([p[key] for p in params])) < 1.95 * np.sqrt(1 / 4000 + 1 / len(on))
    counts = np.bincount(on[:, ORDER].astype(int), minlength=24)
    assert len(counts) == 24 == len({tuple(order) for order in JITTER_ORDERS})
    assert ((counts - len(on) / 24) ** 2 / (len(on) / 24)).sum() < 49.7  # chi-squared, 23 degrees, 1 in a thousand
    off = colour[colour[:, ORDER] < 0]
    assert (off[:, :4] == [1, 1, 1, 0]).all()


def test_rates():
    drawn = draw("moco_v2", solarize_probability=0.3)
    assert drawn.flip.mean() == pytest.approx(0.5, abs=0.015)
    assert (drawn.colour[:, GREY] == 2).mean() == pytest.approx(0.2, abs=0.015)
    assert (drawn.colour[:, SIGMA] > 0).mean() == pytest.approx(0.5, abs=0.015)
    assert (drawn.colour[:, SOLARIZE] == 128).mean() == pytest.approx(0.3, abs=0.015)
    assert set(drawn.colour[:, SOLARIZE].tolist()) == {128, 256}
    first = draw("moco_v1").colour
    assert set(first[:, GREY].tolist()) == {0, 1}
    assert (first[:, SIGMA] == 0).all()


@pytest.mark.parametrize("size", [32, 64, 224, 448])
def test_blur_scales_with_the_picture(size):
    sigma = draw(size=size).colour[:, SIGMA]
    sigma = sigma[sigma > 0]
    assert distance(sigma, np.linspace(0.1, 2.0, 5000) * size / 224) < 0.03


def test_parameters_are_drawn_independently():
    drawn = draw("moco_v2", jitter_probability=1.0, blur_probability=1.0, solarize_probability=0.5)
    boxes = drawn.boxes(400, 400)
    columns = np.column_stack([drawn.colour, drawn.flip, boxes[:, 2] / boxes[:, 3], boxes[:, 2] * boxes[:, 3]])
    again = draw("moco_v2", view=1).colour[:, :4]
    correlation = np.corrcoef(np.column_stack([columns, again]).T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.035


# ---- the key


def test_equal_keys_give_equal_parameters_whatever_stands_beside_them():
    whole = draw(count=50)
    some = augmentation("moco_v2", 224).draw(view_keys(0, np.array([7, 3, 7]), 0))
    for a, b in zip(whole, some, strict=True):
        assert (a[[7, 3, 7]] == b).all()


def test_seed_stamp_and_view_all_matter():
    keys = [view_keys(seed, np.arange(1000) + 2**41 * epoch, view)
            for seed in range(3) for epoch in range(3) for view in range(3)]
    assert all(key.dtype == np.uint64 for key in keys)
    assert len(np.unique(np.concatenate(keys))) == 27_000


def test_nothing_is_taken_from_global_generators():
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
    draw(count=10)
    assert torch.equal(state, torch.get_rng_state())
    assert (legacy == np.random.get_state()[1]).all()


def test_the_numbers_are_the_same_on_every_machine():
    # SplitMix64's first outputs from state 1234567, as published with it.
    from data.augment import _mix

    states = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert _mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


# ---- evaluation


@pytest.mark.parametrize(("size", "resized"), [(224, 235), (32, 33), (64, 67), (96, 100), (8, 8), (1, 1)])
def test_eval_transform_is_the_papers(size, resized):
    short = min(NOISE.size)
    width, height = NOISE.width * resized // short, NOISE.height * resized // short
    image = NOISE.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    expected = np.asarray(image.crop((left, top, left + size, top + size)))
    assert np.array_equal(eval_transform(size)(NOISE).permute(1, 2, 0).numpy(), expected)
    assert str(resized) in eval_transform_name(size)
    assert str(size) in eval_transform_name(size)


def test_eval_transform_draws_nothing():
    state = torch.get_rng_state()
    eval_transform(32)(NOISE)
    assert torch.equal(state, torch.get_rng_state())
    assert eval_transform_name(224) != eval_transform_name(192)


@pytest.mark.parametrize("name", ["", "moco", "moco_v3", "MOCO_V2"])
def test_unknown_name(name):
    with pytest.raises(UserError, match="moco_v1, moco_v2, swav, simclr") as caught:
        augmentation(name, 224)
    assert "\n" not in str(caught.value)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("kind", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("width", "height"), [(500, 375), (31, 47), (1000, 60), (1700, 100), (9, 2000)])
@pytest.mark.parametrize(("resized", "crop"), [(235, 224), (33, 32), (32, 32)])
def test_the_centre_crop_is_torchvisions_resize_and_center_crop(width, height, resized, crop, kind):
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(0).integers(0, 60, (height, width))
    image = Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y + noise) % 256], -1).astype(np.uint8))
    whole = transforms.functional.resize(image, resized, transforms.InterpolationMode(kind))
    expected = np.asarray(transforms.functional.center_crop(whole, crop)).astype(int)
    found = CentreCrop(resized, crop, kind)(image).permute(1, 2, 0).numpy().astype(int)
    if max(width, height) <= 16 * min(width, height):
        assert (found == expected).all()
    else:  # 8 bits between the two passes, whose order Pillow chooses by the sizes
        smooth = np.abs(found - expected)[..., :2]
        assert smooth.max() <= 1
        assert np.abs(found - expected).mean() < 0.5


def test_a_long_image_takes_no_more_memory_than_its_crop():
    image = Image.new("RGB", (3, 65_000), (9, 8, 7))  # resized as a whole: 235 x 5 million pixels, 3.6 GB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (CentreCrop(235, 224)(image) == torch.tensor([9, 8, 7], dtype=torch.uint8)[:, None, None]).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
