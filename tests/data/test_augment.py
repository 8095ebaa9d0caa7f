"""Presets have the original's parameters in the original's order, and draw from torch's generator alone."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms

from data.augment import (
    PRESETS,
    GaussianBlur,
    eval_transform,
    eval_transform_name,
    training_transform,
)
from runtime.errors import UserError

NAMES = ["moco_v1", "moco_v2", "swav", "simclr"]
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


def kinds(transform):
    steps = [step.transforms[0] if isinstance(step, transforms.RandomApply) else step for step in transform.transforms]
    return [type(step).__name__ for step in steps]


def test_names_and_statistics():
    assert set(PRESETS) == set(NAMES)
    assert PRESETS["moco_v1"] == PRESETS["simclr"]
    with pytest.raises(AttributeError):
        PRESETS["swav"].crop_scale = (0.5, 1)


@pytest.mark.parametrize(("name", "low"), [("moco_v2", 0.2), ("swav", 0.14)])
def test_moco_v2_and_swav_steps(name, low):
    transform = training_transform(name, 224)
    assert kinds(transform) == [
        "RandomResizedCrop",
        "ColorJitter",
        "RandomGrayscale",
        "GaussianBlur",
        "RandomHorizontalFlip",
        "PILToTensor",
    ]
    crop, jitter, grey, blur, flip, _ = transform.transforms
    assert crop.scale == (low, 1.0)
    assert crop.ratio == (3 / 4, 4 / 3)
    assert crop.size == (224, 224)
    assert jitter.p == 0.8
    assert jitter.transforms[0].brightness == (0.6, 1.4)
    assert jitter.transforms[0].contrast == (0.6, 1.4)
    assert jitter.transforms[0].saturation == (0.6, 1.4)
    assert jitter.transforms[0].hue == (-0.1, 0.1)
    assert grey.p == 0.2
    assert blur.p == 0.5
    assert (blur.transforms[0].low, blur.transforms[0].high) == (0.1, 2.0)
    assert flip.p == 0.5


@pytest.mark.parametrize("name", ["moco_v1", "simclr"])
def test_moco_v1_and_simclr_steps(name):
    transform = training_transform(name, 224)
    assert kinds(transform) == [
        "RandomResizedCrop",
        "RandomGrayscale",
        "ColorJitter",
        "RandomHorizontalFlip",
        "PILToTensor",
    ]
    assert not any(isinstance(step, transforms.RandomApply) for step in transform.transforms)
    assert transform.transforms[0].scale == (0.2, 1.0)
    assert transform.transforms[1].p == 0.2
    assert transform.transforms[2].hue == (-0.4, 0.4)


@pytest.mark.parametrize("size", [32, 64, 112, 224, 448])
def test_blur_scales_with_the_picture(size):
    blur = training_transform("moco_v2", size).transforms[3].transforms[0]
    assert blur.low == pytest.approx(0.1 * size / 224)
    assert blur.high == pytest.approx(2.0 * size / 224)


def test_blur_is_pillows_with_a_uniform_radius():
    torch.manual_seed(3)
    radius = torch.empty(1).uniform_(0.1, 2.0).item()
    torch.manual_seed(3)
    blurred = GaussianBlur(0.1, 2.0)(NOISE)
    assert np.array_equal(np.asarray(blurred), np.asarray(NOISE.filter(ImageFilter.GaussianBlur(radius))))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [8, 32, 65])
@pytest.mark.parametrize("mode", ["colour", "tiny", "wide"])
def test_output_is_uint8_of_the_size_asked_for(name, size, mode):
    image = {"colour": NOISE, "tiny": NOISE.crop((0, 0, 1, 1)), "wide": NOISE.resize((300, 3))}[mode]
    view = training_transform(name, size)(image)
    assert view.dtype == torch.uint8
    assert view.shape == (3, size, size)
    evaluated = eval_transform(size)(image)
    assert evaluated.dtype == torch.uint8
    assert evaluated.shape == (3, size, size)


@pytest.mark.parametrize("name", NAMES)
def test_all_randomness_is_torchs_default_generator(name):
    transform = pickle.loads(pickle.dumps(training_transform(name, 32)))
    views = []
    for other in range(6):
        random.seed(other)
        np.random.seed(other)
        torch.manual_seed(11)
        views.append(transform(NOISE))
    assert all(torch.equal(views[0], view) for view in views)
    torch.manual_seed(12)
    assert not torch.equal(views[0], transform(NOISE))


def test_flip_and_grey_rates():
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, :16, 0] = 200  # red on the left
    transform = training_transform("moco_v2", 32)
    torch.manual_seed(0)
    views = [transform(Image.fromarray(half)).float() for _ in range(400)]
    grey = np.mean([bool((view[0] == view[1]).all() and (view[1] == view[2]).all()) for view in views])
    assert 0.12 < grey < 0.32  # 0.2, and some crops hold no red at all
    left = [view[0, :, :16].mean() > view[0, :, 16:].mean() for view in views]
    assert 0.4 < np.mean(left) < 0.6


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
        training_transform(name, 224)
    assert "\n" not in str(caught.value)
    assert repr(name) in str(caught.value)
