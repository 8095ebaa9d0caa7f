"""Named augmentations: the random parameters of a view. The pixels are made elsewhere.

A view's parameters depend only on (seed, stamp, view), so they do not change with workers, ranks, resumes, or the
implementation: data.views and data.colour apply the same parameters with Pillow or with torch.

    python -m data.preview --output sheet.png --data DIR --aug moco_v2       # draws them
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from runtime.errors import UserError

Transform = Callable[[Image.Image], torch.Tensor]


@dataclass(frozen=True)
class Preset:
    """One training augmentation: crop, then colour jitter and greyscale in the order given, blur, solarise, flip."""

    crop_scale: tuple[float, float]  # fraction of the image's area
    jitter: tuple[float, float, float, float]  # brightness, contrast, saturation, hue
    jitter_probability: float
    blur_probability: float
    grayscale_first: bool = False
    grayscale_probability: float = 0.2
    blur_radius: tuple[float, float] = (0.1, 2.0)  # pixels at image size 224
    solarize_probability: float = 0.0
    flip_probability: float = 0.5


# As in the original code, where moco_v1 and simclr are the same list of transforms (MoCo v1's, so simclr has no
# blur); both names are kept because published commands use them.
_MOCO_V1 = Preset((0.2, 1.0), (0.4, 0.4, 0.4, 0.4), 1.0, blur_probability=0.0, grayscale_first=True)

PRESETS: dict[str, Preset] = {
    "moco_v1": _MOCO_V1,
    "moco_v2": Preset((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8, blur_probability=0.5),
    "swav": Preset((0.14, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8, blur_probability=0.5),
    "simclr": _MOCO_V1,
}

# For the linear protocol and fine-tuning: torchvision's RandomResizedCrop with its default scale, and a flip. Not in
# PRESETS, because it is not for distillation.
LINEAR = Preset((0.08, 1.0), (0.0, 0.0, 0.0, 0.0), 0.0, blur_probability=0.0, grayscale_probability=0.0)

# ---- parameters

# Columns of a view's colour parameters, float32. Factors as in torchvision, 1 for no change; hue in turns of the colour
# circle, 0 for no change; order: row of JITTER_ORDERS, -1 for no jitter; grey: 0 no, 1 before the jitter, 2 after it;
# sigma of the blur in pixels, 0 for no blur; solarize inverts values of at least this, 256 for none.
COLOUR = ("brightness", "contrast", "saturation", "hue", "order", "grey", "sigma", "solarize")
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, SIGMA, SOLARIZE = range(len(COLOUR))
JITTER_ORDERS = tuple(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))
NO_COLOUR = (1.0, 1.0, 1.0, 0.0, -1.0, 0.0, 0.0, 256.0)

CROP_ATTEMPTS, CROP_RATIO = 10, (3 / 4, 4 / 3)  # torchvision's RandomResizedCrop


class Views(NamedTuple):
    """The random parameters of n views, independent of the images' sizes.

    sides: float64 [n, 10, 2], ten candidates for a crop's (height, width), in units of the square root of the image's
    area. place: float64 [n, 2] in [0, 1), the position of the crop. flip: bool [n]. colour: float32 [n, 8], see COLOUR.
    """

    sides: np.ndarray
    place: np.ndarray
    flip: np.ndarray
    colour: np.ndarray

    def boxes(self, height: int, width: int, rows: slice | list[int] = slice(None)) -> np.ndarray:
        """Crops of an image of height x width: int64 [n, 4], (top, left, height, width), for some rows or all.

        As in torchvision's RandomResizedCrop: the first candidate that fits, else the largest centred crop whose
        aspect ratio is allowed.
        """
        sides = np.rint(self.sides[rows] * math.sqrt(height * width)).astype(np.int64)  # [n, 10, 2]
        size = np.array((height, width))
        fits = ((sides > 0) & (sides <= size)).all(axis=2)
        chosen = sides[np.arange(len(sides)), fits.argmax(axis=1)]  # [n, 2]
        corner = (self.place[rows] * (size - chosen + 1)).astype(np.int64)
        failed = ~fits.any(axis=1)
        if failed.any():
            whole = np.array((min(height, round(width / CROP_RATIO[0])), min(width, round(height * CROP_RATIO[1]))))
            chosen[failed], corner[failed] = whole, (size - whole) // 2
        return np.concatenate([corner, chosen], axis=1)


@dataclass(frozen=True)
class Augmentation:
    """A preset at an image size. The blur radius is given for 224 pixels and scales with image_size, so that it
    hides the same fraction of the image: a radius of 2 pixels would erase a 32-pixel image. ``also``: a second size at
    which the same crop, with the same colours, is made for a teacher whose image size differs."""

    preset: Preset
    image_size: int
    also: int | None = None

    def draw(self, keys: np.ndarray) -> Views:
        """Keys of view_keys, uint64 [n] -> the parameters of n views. Equal keys give equal parameters."""
        preset = self.preset
        u = _uniform(keys, 13 + 2 * CROP_ATTEMPTS)
        area, ratio = u[:, 13 : 13 + CROP_ATTEMPTS], u[:, 13 + CROP_ATTEMPTS :]
        area = _between(area, *preset.crop_scale)
        ratio = np.exp(_between(ratio, *np.log(CROP_RATIO)))
        sides = np.sqrt(np.stack([area / ratio, area * ratio], axis=2))
        colour = np.tile(np.array(NO_COLOUR, np.float32), (len(keys), 1))
        jitter = u[:, 1] < preset.jitter_probability
        for column, strength in zip((BRIGHTNESS, CONTRAST, SATURATION), preset.jitter[:3], strict=True):
            factor = _between(u[:, 2 + column], max(0.0, 1 - strength), 1 + strength)
            colour[jitter, column] = factor[jitter]
        colour[jitter, HUE] = _between(u[jitter, 5], -preset.jitter[3], preset.jitter[3])
        colour[jitter, ORDER] = np.floor(u[jitter, 6] * len(JITTER_ORDERS))
        colour[u[:, 7] < preset.grayscale_probability, GREY] = 1 if preset.grayscale_first else 2
        blur = u[:, 8] < preset.blur_probability
        low, high = (radius * self.image_size / 224 for radius in preset.blur_radius)
        colour[blur, SIGMA] = _between(u[blur, 9], low, high)
        colour[u[:, 10] < preset.solarize_probability, SOLARIZE] = 128
        return Views(sides, u[:, 11:13], u[:, 0] < preset.flip_probability, colour)


def augmentation(name: str, image_size: int, also: int | None = None) -> Augmentation:
    """PRESETS[name] at one image size, or at two. Raises UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"augmentation {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    return Augmentation(PRESETS[name], image_size, also)


def draw_views(augmentations: Sequence[Augmentation], seed: int, stamps: np.ndarray) -> list[tuple[int, Views]]:
    """(side in pixels, parameters) of each view of the images with these stamps, int64 [n]: first one view for each
    augmentation, then a view with the same parameters for each augmentation that has a second size."""
    keys = [view_keys(seed, stamps, number) for number in range(len(augmentations))]
    sizes = [dataclasses.replace(x, image_size=x.also) if x.also else None for x in augmentations]
    return [(x.image_size, x.draw(key)) for x, key in zip([*augmentations, *sizes], keys * 2, strict=True) if x]


def view_keys(seed: int, stamps: np.ndarray, view: int) -> np.ndarray:
    """uint64 [n]: the key of view number ``view`` for each of the stamps, int64 [n]."""
    key = np.full(len(stamps), seed, np.uint64)
    for part in (np.asarray(stamps).astype(np.uint64), np.uint64(view)):
        key = _mix(key * _GOLDEN + _GOLDEN) ^ part
    return _mix(key)


# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a counter and a mixing function, so a batch's random numbers take a
# few operations on whole arrays. Seeding a generator for each view would take longer than drawing its numbers.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniform(keys: np.ndarray, count: int) -> np.ndarray:
    """float64 [n, count] in [0, 1), 53 random bits each."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return (_mix(keys[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def _between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * u


# ---- evaluation

LONG = 16

@dataclass(frozen=True)
class CentreCrop:
    """PIL RGB -> uint8 [3, crop, crop]: resizes the shorter side to `resize` pixels and crops the centre.

    Uses torchvision's Resize and CenterCrop. If one side is more than LONG times the other, only the crop's pixels are
    made, to save memory; they differ by the rounding between Pillow's two passes. str() describes the transform in a
    few words, which are recorded beside features made with it.
    """

    resize: int
    crop: int
    filter: str = "bicubic"

    def __call__(self, image: Image.Image) -> torch.Tensor:
        if max(image.size) > LONG * min(image.size):
            return pil_to_tensor(self._part(image))
        resized = resize(image, self.resize, InterpolationMode(self.filter))
        return pil_to_tensor(center_crop(resized, self.crop))

    def _part(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        wide, high = (self.resize * side // min(image.size) for side in image.size)   # of the whole image, resized
        left, top = (round((side - self.crop) / 2) for side in (wide, high))
        box = (left * width / wide, top * height / high,                              # in pixels of the image
               (left + self.crop) * width / wide, (top + self.crop) * height / high)
        return image.resize((self.crop, self.crop), Image.Resampling[self.filter.upper()], box)

    def __str__(self) -> str:
        return f"resize {self.resize} {self.filter}, centre crop {self.crop}"


def eval_transform(image_size: int) -> CentreCrop:
    """The paper's transform for mining and k-NN: resize the shorter side to floor(1.05 * image_size), bicubic, then
    crop the centre."""
    return CentreCrop(int(1.05 * image_size), image_size)


def linear_transform(image_size: int) -> CentreCrop:
    """The linear protocol's transform of test images: Resize(256), CenterCrop(224), bilinear, scaled to other sizes."""
    return CentreCrop(round(image_size * 256 / 224), image_size, "bilinear")


def eval_transform_name(image_size: int) -> str:
    """eval_transform in a few words."""
    return str(eval_transform(image_size))
