"""A small rendered image set whose classes are surface patterns.

The class is the pattern (checks, bricks, honeycomb, ...).  Colour, polarity, place, size, turn, lighting
and noise are drawn anew for each image and say nothing about the class, so that the features of an untrained
network group the images by colour and brightness, while a network trained to recognise augmented views of
the same image groups them by pattern.  Pure numpy + PIL; the same arguments give the same files.
"""
from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

VERSION = 1
TAU = 2.0 * np.pi
TINT = 0.12


def _saw(x: np.ndarray) -> np.ndarray:
    """Triangle wave of period 1: 0 at whole numbers, 1 half-way between them."""
    return 1.0 - np.abs(2.0 * (x - np.floor(x)) - 1.0)


def _nearest(u: np.ndarray, v: np.ndarray, rng: np.random.Generator, jitter: float, stagger: bool
             ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Nearest point of a jittered lattice: (dx, dy, d1, d2, r), each like `u`, in lattice units.

    (dx, dy) is the offset from the nearest point, d1 and d2 the distances to the nearest and the second
    nearest, r a number in [0, 1) that belongs to the nearest point.  `stagger` gives a hexagonal lattice.
    """
    table = rng.random((3, 32, 32), dtype=np.float32)
    high = np.float32(np.sqrt(0.75) if stagger else 1.0)
    dx, dy, r = np.zeros((3, *u.shape), np.float32)
    d1, d2 = np.full((2, *u.shape), 99.0, np.float32)
    row0 = np.rint(v / high).astype(int)
    for row in (row0 - 1, row0, row0 + 1):
        shift = np.float32(0.5) * (row & 1) if stagger else np.float32(0.0)
        col0 = np.rint(u - shift).astype(int)
        for col in (col0 - 1, col0, col0 + 1):
            at = (row & 31) * 32 + (col & 31)
            x = u - (col + shift).astype(np.float32)
            y = v - row.astype(np.float32) * high
            if jitter:
                x -= jitter * (table[0].take(at) - 0.5)
                y -= jitter * (table[1].take(at) - 0.5)
            d = x * x + y * y
            near = d < d1
            np.minimum(d2, np.maximum(d, d1), out=d2)
            np.minimum(d1, d, out=d1)
            np.copyto(dx, x, where=near)
            np.copyto(dy, y, where=near)
            if jitter:
                np.copyto(r, table[2].take(at), where=near)
    return dx, dy, np.sqrt(d1), np.sqrt(d2), r


def _stripes(u, v, rng):
    return _saw(u * 1.2) < rng.uniform(0.42, 0.58)


def _zigzag(u, v, rng):
    return _saw(v * 1.1 + 0.55 * _saw(u * 0.9)) < rng.uniform(0.42, 0.58)


def _rings(u, v, rng):
    return _saw(np.hypot(u, v) * 1.2) < rng.uniform(0.42, 0.58)


def _checks(u, v, rng):
    return (np.floor(u * 1.1) + np.floor(v * 1.1)) % 2 < 1


def _triangles(u, v, rng):
    a, b = u * 0.9, (-0.5 * u + np.sqrt(0.75) * v) * 0.9
    return (np.floor(a) + np.floor(b) + np.floor(-a - b)) % 2 < 1


def _honeycomb(u, v, rng):
    _, _, d1, d2, _ = _nearest(u, v, rng, 0.0, True)
    return d2 - d1 < rng.uniform(0.16, 0.24)


def _bricks(u, v, rng):
    row, line = v * 1.25, rng.uniform(0.09, 0.12)
    brick = u * 0.6 + 0.5 * (np.floor(row) % 2)
    return (_saw(row) < 2 * line) | (_saw(brick) < 0.96 * line)


def _grid(u, v, rng):
    line = rng.uniform(0.18, 0.28)
    return (_saw(u) < line) | (_saw(v) < line)


def _weave(u, v, rng):
    flat = (np.floor(u * 0.6) + np.floor(v * 0.6)) % 2 < 1
    return np.where(flat, _saw(u * 1.8), _saw(v * 1.8)) < rng.uniform(0.42, 0.55)


def _dots(u, v, rng):
    return _nearest(u, v, rng, 0.0, True)[2] < rng.uniform(0.26, 0.34)


def _stars(u, v, rng):
    dx, dy, d1, _, _ = _nearest(u * 0.8, v * 0.8, rng, 0.0, True)
    point = _saw(np.arctan2(dy, dx) * 5 / TAU)
    return d1 < 0.46 - 0.30 * point ** 0.7


def _crosses(u, v, rng):
    dx, dy, _, _, _ = _nearest(u * 0.85, v * 0.85, rng, 0.0, False)
    x, y, arm = np.abs(dx), np.abs(dy), rng.uniform(0.09, 0.12)
    return (np.minimum(x, y) < arm) & (np.maximum(x, y) < 0.36)


def _scales(u, v, rng):
    row0, line, out = np.floor(v * 2).astype(int), rng.uniform(0.09, 0.13), np.zeros(u.shape, bool)
    for dr in (1, 0, -1, -2):
        row = row0 + dr
        x = (u * 0.9 + 0.5 * (row % 2)) % 1.0 - 0.5
        d = np.hypot(x, v - row * 0.5 - 0.25)
        out = np.where(d < 0.56, d > 0.56 - line, out)
    return out


def _cells(u, v, rng):
    _, _, d1, d2, _ = _nearest(u * 0.9, v * 0.9, rng, 0.9, False)
    return d2 - d1 < rng.uniform(0.10, 0.16)


def _blobs(u, v, rng):
    total = np.zeros_like(u)
    for turn, phase, pace in rng.uniform(0, TAU, (20, 3)).astype(np.float32):
        k = 3.5 + 0.35 * pace
        total += np.cos(u * (k * np.cos(turn)) + (v * (k * np.sin(turn)) + phase))
    return total > 0


def _sticks(u, v, rng):
    dx, dy, _, _, r = _nearest(u * 1.1, v * 1.1, rng, 0.5, False)
    c, s = np.cos(TAU * r), np.sin(TAU * r)
    return (np.abs(c * dx + s * dy) < 0.42) & (np.abs(c * dy - s * dx) < rng.uniform(0.10, 0.14))


_PATTERNS = {f.__name__[1:]: f for f in (
    _blobs, _bricks, _cells, _checks, _crosses, _dots, _grid, _honeycomb,
    _rings, _scales, _stars, _sticks, _stripes, _triangles, _weave, _zigzag)}
CLASSES: tuple[str, ...] = tuple(_PATTERNS)


def _colours(rng: np.random.Generator) -> np.ndarray:
    """Two RGB colours [2, 3] in 0..1, of clearly different lightness, in random order."""
    while True:
        pair = rng.uniform(0.05, 0.95, (2, 1)) + rng.uniform(-1, 1, (2, 3)) * TINT
        light = pair @ (0.299, 0.587, 0.114)
        if 0.25 < abs(light[0] - light[1]) < 0.7:
            return pair


def render(class_index: int, rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """One image of class CLASSES[class_index]: uint8 [size, size, 3], drawn at twice the size."""
    n = 2 * size
    y, x = ((np.mgrid[0:n, 0:n] + 0.5) / n - 0.5).astype(np.float32)
    cells, turn = np.exp(rng.uniform(np.log(4.0), np.log(7.0))), rng.uniform(0, TAU)
    place = rng.uniform(-1.0, 1.0, 2) * (1.5 if CLASSES[class_index] == "rings" else 20.0)
    c, s = np.float32(cells * np.cos(turn)), np.float32(cells * np.sin(turn))
    u, v = c * x + s * y + np.float32(place[0]), c * y - s * x + np.float32(place[1])
    ink = _PATTERNS[CLASSES[class_index]](u, v, rng).astype(np.float32)
    ink = ink.reshape(size, 2, size, 2).mean((1, 3))[..., None]
    colours = _colours(rng)
    image = colours[0] + (colours[1] - colours[0]) * ink
    angle, strength = rng.uniform(0, TAU), rng.uniform(0.0, 0.7)
    ramp = (np.cos(angle) * x + np.sin(angle) * y)[::2, ::2, None]
    image = image * ((1.0 + strength * ramp) * rng.uniform(0.75, 1.1))
    image += rng.uniform(0.0, 0.03) * rng.standard_normal(image.shape, np.float32)
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def write_demo(root: Path, train_per_class: int = 200, test_per_class: int = 60, seed: int = 0,
               size: int = 64) -> Path:
    """Write root/{train,test}/<class>/0000.jpg, ... and root/demo.json, and return root.

    A root whose demo.json already says the same is left alone.  The files appear all at once: they are
    written to a sibling folder that is then renamed.
    """
    root = Path(root)
    counts = {"train": train_per_class, "test": test_per_class}
    about = {"version": VERSION, "seed": seed, "size": size, "classes": list(CLASSES), **counts}
    note = root / "demo.json"
    if note.is_file() and json.loads(note.read_text()) == about:
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
        (part / "demo.json").write_text(json.dumps(about, indent=1) + "\n")
        if root.exists():
            shutil.rmtree(root)
        os.replace(part, root)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return root
