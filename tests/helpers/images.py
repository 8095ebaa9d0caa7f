"""Small images whose classes a network can tell apart."""

import io

import numpy as np
from PIL import Image


def render(path, kind, rng):
    """A 32-pixel JPEG whose class is the direction of its stripes; colour and place are free."""
    y, x = np.mgrid[:32, :32] / 32
    wave = [x, y, x + y, x - y][kind]
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * (4 * wave + rng.random()))
    dark, light = rng.integers(0, 110, 3), rng.integers(140, 255, 3)
    pixels = dark + (light - dark) * wave[..., None] + rng.normal(0, 6, (32, 32, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=92)


def render_tree(root, **splits):
    """``splits`` (train=10): so many images of each of four classes below root/train, the same ones each time."""
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for kind, name in enumerate(("across", "down", "fall", "rise")):
            for i in range(count):
                render(root / split / name / f"{split}{i:02d}.jpg", kind, rng)


def render_classes(folder, count):
    """``count`` images of each of four classes in class0 to class3, the same ones each time."""
    rng = np.random.default_rng(0)
    for kind in range(4):
        for i in range(count):
            render(folder / f"class{kind}" / f"{i}.jpg", kind, rng)


def render_flat(folder):
    """Twelve images without classes."""
    for i in range(12):
        render(folder / f"{i}.jpg", i % 4, np.random.default_rng(i))
    return folder


def saved(image, kind, **options):
    """The open file of a Pillow image in the format ``kind``."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file
