"""A small rendered image set whose classes are surface patterns.

The class is the pattern (checks, bricks, rings, ...). Colour, brightness, position, size, rotation, lighting and
noise are random for each image and independent of the class. So the features of an untrained network group the images
by colour and brightness, while a network trained to recognise augmented views of the same image groups them by
pattern. Only numpy and Pillow are used; the same arguments give the same files.
"""
from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.state import load_json, save_json

VERSION = 1
TAU = math.tau

# How much the images of one class vary; wider ranges make the set harder for a short training.
CELLS = (2.7, 3.3)  # pattern cells across the image
TURN = 0.06  # largest rotation in either direction, in radians
TINT = 0.04  # largest colour cast of each of the two colours
CONTRAST = (0.45, 0.7)  # difference in lightness between the light and the dark colour
LIGHTING = 0.5  # largest relative change of brightness across the image
GAIN = (0.75, 1.1)  # brightness of the whole image
NOISE = 0.03  # largest standard deviation of the pixel noise


def _saw(x: np.ndarray) -> np.ndarray:
    """Triangle wave of period 1: 0 at whole numbers, 1 half-way between them."""
    return 1.0 - np.abs(2.0 * (x - np.floor(x)) - 1.0)


def _offset(x: np.ndarray) -> np.ndarray:
    """Signed distance from the nearest whole number."""
    return x - np.rint(x)


# A pattern takes float coordinates u, v of equal shape, in cells, and returns booleans: True is the light colour.

def _blobs(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    total = np.zeros_like(u)
    for turn, phase, pace in rng.uniform(0, TAU, (20, 3)).astype(np.float32):
        k = 3.5 + 0.35 * pace
        total += np.cos(u * (k * np.cos(turn)) + (v * (k * np.sin(turn)) + phase))
    return total > 0


def _bricks(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    row, line = v * 1.25, rng.uniform(0.09, 0.12)
    brick = u * 0.6 + 0.5 * (np.floor(row) % 2)
    return (_saw(row) < 2 * line) | (_saw(brick) < 0.96 * line)


def _checks(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (np.floor(u * 1.1) + np.floor(v * 1.1)) % 2 < 1


def _crosses(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    x, y, arm = np.abs(_offset(u * 0.85)), np.abs(_offset(v * 0.85)), rng.uniform(0.09, 0.12)
    return (np.minimum(x, y) < arm) & (np.maximum(x, y) < 0.36)


def _dots(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    high = np.float32(np.sqrt(0.75))
    row = np.rint(v / high)
    return np.hypot(_offset(u - 0.5 * (row % 2)), v - row * high) < rng.uniform(0.26, 0.34)


def _rings(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _saw(np.hypot(u, v) * 1.2) < rng.uniform(0.42, 0.58)


def _stripes(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _saw(u * 1.2) < rng.uniform(0.42, 0.58)


def _triangles(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    a, b = u * 0.9, (-0.5 * u + np.float32(np.sqrt(0.75)) * v) * 0.9
    return (np.floor(a) + np.floor(b) + np.floor(-a - b)) % 2 < 1


def _weave(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    flat = (np.floor(u * 0.6) + np.floor(v * 0.6)) % 2 < 1
    return np.where(flat, _saw(u * 1.8), _saw(v * 1.8)) < rng.uniform(0.42, 0.55)


def _zigzag(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _saw(v * 1.1 + 0.55 * _saw(u * 0.9)) < rng.uniform(0.42, 0.58)


_PATTERNS = {f.__name__[1:]: f for f in (
    _blobs, _bricks, _checks, _crosses, _dots, _rings, _stripes, _triangles, _weave, _zigzag)}
CLASSES: tuple[str, ...] = tuple(_PATTERNS)


def _colours(rng: np.random.Generator) -> np.ndarray:
    """A dark and a light RGB colour, float [2, 3] in about 0..1."""
    while True:
        pair = rng.uniform(0.05, 0.95, (2, 1)) + rng.uniform(-TINT, TINT, (2, 3))
        light = pair @ (0.299, 0.587, 0.114)
        if CONTRAST[0] < light[1] - light[0] < CONTRAST[1]:
            return pair


def render(class_index: int, rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """One image of class CLASSES[class_index]: uint8 [size, size, 3]. The pattern is drawn at twice the size and
    averaged down."""
    n = 2 * size
    y, x = ((np.mgrid[0:n, 0:n] + 0.5) / n - 0.5).astype(np.float32)
    cells, turn = np.exp(rng.uniform(*np.log(CELLS))), rng.uniform(-TURN, TURN)
    place = rng.uniform(-1.0, 1.0, 2) * (1.0 if CLASSES[class_index] == "rings" else 20.0)
    c, s = np.float32(cells * np.cos(turn)), np.float32(cells * np.sin(turn))
    u, v = c * x + s * y + np.float32(place[0]), c * y - s * x + np.float32(place[1])
    ink = _PATTERNS[CLASSES[class_index]](u, v, rng).astype(np.float32)
    ink = ink.reshape(size, 2, size, 2).mean((1, 3))[..., None]
    colours = _colours(rng)
    image = colours[0] + (colours[1] - colours[0]) * ink
    angle, strength = rng.uniform(0, TAU), rng.uniform(0.0, LIGHTING)
    ramp = (np.cos(angle) * x + np.sin(angle) * y)[::2, ::2, None]
    image = image * ((1.0 + strength * ramp) * rng.uniform(*GAIN))
    image += rng.uniform(0.0, NOISE) * rng.standard_normal(image.shape, np.float32)
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def write_demo(root: Path, train_per_class: int = 300, test_per_class: int = 90, seed: int = 0,
               size: int = 64) -> Path:
    """Write root/{train,test}/<class>/0000.jpg, ... and root/demo.json, and return root.

    Does nothing if root/demo.json already records these arguments. The files appear all at once: they are
    written to a sibling folder, which is then renamed.
    """
    root = Path(root)
    counts = {"train": train_per_class, "test": test_per_class}
    about = {"version": VERSION, "seed": seed, "size": size, "classes": list(CLASSES), **counts}
    note = root / "demo.json"
    with contextlib.suppress(OSError, ValueError):  # missing or damaged: write it again
        if load_json(note) == about:
            return root
    root.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=root.name + ".", dir=root.parent))
    part.chmod(0o755)
    try:
        for split_index, (split, count) in enumerate(counts.items()):
            for index, name in enumerate(CLASSES):
                folder = part / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    rng = np.random.default_rng((seed, split_index, index, i))
                    Image.fromarray(render(index, rng, size)).save(folder / f"{i:04d}.jpg", quality=90)
        save_json(about, part / "demo.json")
        if root.exists():
            shutil.rmtree(root)
        part.replace(root)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return root
