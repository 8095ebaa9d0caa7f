"""Named training augmentations and the evaluation transform: PIL RGB in, uint8 [3, S, S] out.

All randomness comes from torch's default generator, so seeding that decides every pixel. Normalisation is not
done here: it happens on the device, with the mean and deviation of the model that looks at the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from runtime.errors import UserError

Transform = Callable[[Image.Image], torch.Tensor]


@dataclass(frozen=True)
class Preset:
    """One training augmentation: crop, then colour and grey in the order given, then blur, then a flip."""

    crop_scale: tuple[float, float]  # share of the picture's area
    jitter: tuple[float, float, float, float]  # brightness, contrast, saturation, hue
    jitter_probability: float
    blur_probability: float
    grayscale_first: bool = False
    grayscale_probability: float = 0.2
    blur_radius: tuple[float, float] = (0.1, 2.0)  # pixels at image size 224


# As in the original's code. There moco_v1 and simclr are one and the same list of transforms (MoCo v1's, so
# simclr has no blur); both names are kept because published commands use them.
_MOCO_V1 = Preset((0.2, 1.0), (0.4, 0.4, 0.4, 0.4), 1.0, blur_probability=0.0, grayscale_first=True)

PRESETS: dict[str, Preset] = {
    "moco_v1": _MOCO_V1,
    "moco_v2": Preset((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8, blur_probability=0.5),
    "swav": Preset((0.14, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8, blur_probability=0.5),
    "simclr": _MOCO_V1,
}


class GaussianBlur:
    """Pillow's blur with a uniformly drawn radius. A class, so that spawned workers can pickle it."""

    def __init__(self, low: float, high: float):
        self.low, self.high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        radius = torch.empty(1).uniform_(self.low, self.high).item()
        return image.filter(ImageFilter.GaussianBlur(radius))

    def __repr__(self) -> str:
        return f"GaussianBlur({self.low:g}, {self.high:g})"


def training_transform(name: str, image_size: int) -> Transform:
    """PIL RGB of any size -> uint8 [3, image_size, image_size], augmented as PRESETS[name] says.

    The blur radius is stated at 224 pixels and scales with image_size, so that it hides the same share of the
    picture: 2 pixels would leave nothing of a 32-pixel image. Raises UserError for an unknown name.
    """
    if name not in PRESETS:
        raise UserError(f"augmentation {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    jitter = transforms.ColorJitter(*preset.jitter)
    if preset.jitter_probability < 1:
        jitter = transforms.RandomApply([jitter], p=preset.jitter_probability)
    colour = [jitter, transforms.RandomGrayscale(preset.grayscale_probability)]
    steps = [transforms.RandomResizedCrop(image_size, scale=preset.crop_scale)]
    steps += reversed(colour) if preset.grayscale_first else colour
    if preset.blur_probability:
        blur = GaussianBlur(*(radius * image_size / 224 for radius in preset.blur_radius))
        steps.append(transforms.RandomApply([blur], p=preset.blur_probability))
    steps += [transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    return transforms.Compose(steps)


def eval_transform(image_size: int) -> Transform:
    """The paper's transform for mining and k-NN: PIL RGB -> uint8 [3, image_size, image_size].

    The shorter side is resized to floor(1.05 * image_size), bicubic, and the centre is cut out.
    """
    return transforms.Compose(
        [
            transforms.Resize(int(1.05 * image_size), interpolation=InterpolationMode.BICUBIC),
            transforms.CenterCrop(image_size),
            transforms.PILToTensor(),
        ]
    )


def eval_transform_name(image_size: int) -> str:
    """What eval_transform does, in a few words, to be recorded beside features made with it."""
    return f"resize {int(1.05 * image_size)} bicubic, centre crop {image_size}"
