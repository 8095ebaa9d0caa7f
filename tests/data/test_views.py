"""Crops by torch, one at a time and batched, beside Pillow's own."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image

from data.augment import NO_COLOUR, augmentation, view_keys
from data.views import batched_crop, fast_crop, pil_view

SHAPES = [(32, 32), (60, 45), (1, 1), (3, 200), (97, 97)]
PLAIN = np.array(NO_COLOUR, np.float32)


def picture(shape, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    smooth = np.stack([127 + 120 * np.sin(x / 7 + k) * np.cos(y / 5 - k) for k in range(3)], -1)
    return np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)


def views(shape, size, count=40):
    drawn = augmentation("moco_v2", size).draw(view_keys(1, np.arange(count), 0))
    return drawn.boxes(*shape), drawn.flip


def expected_view(image, box, flip, size):
    """torchvision's transforms of the original on a PIL image."""
    view = TF.resized_crop(image, *box.tolist(), [size, size])
    return np.asarray(TF.hflip(view) if flip else view).astype(float)


def difference(view, expected):
    return np.abs(view.permute(1, 2, 0).double().numpy() - expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [8, 32, 70])
def test_views_without_colour(shape, size):
    image = Image.fromarray(picture(shape))
    pixels = TF.pil_to_tensor(image)
    boxes, flips = views(shape, size)
    assert flips.any()
    assert not flips.all()
    batch = batched_crop(pixels.expand(len(boxes), -1, -1, -1), boxes, flips, size)
    assert batch.dtype == torch.uint8
    for row, (box, flip) in enumerate(zip(boxes, flips, strict=True)):
        expected = expected_view(image, box, flip, size)
        assert difference(pil_view(image, box, flip, PLAIN, size), expected).max() == 0
        out = torch.empty(3, size, size, dtype=torch.uint8)
        fast_crop(pixels, box, flip, out)
        assert difference(out, expected).max() <= 1
        # Pillow's filter and rounding; but Pillow 13 resizes the shorter way first, and so rounds other values.
        assert difference(batch[row], expected).max() <= 2
        assert difference(batch[row], expected).mean() < 0.35


def test_memory_layouts_do_not_matter():
    pixels = TF.pil_to_tensor(Image.fromarray(picture((60, 45))))
    boxes, flips = views((60, 45), 24, 10)
    for other in (pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1), pixels.permute(0, 2, 1).contiguous().mT):
        for box, flip in zip(boxes, flips, strict=True):
            a, b = torch.zeros(2, 3, 24, 24, dtype=torch.uint8)
            fast_crop(pixels, box, flip, a)
            fast_crop(other, box, flip, b)
            assert (a.int() - b.int()).abs().max() <= 1


def test_a_batch_of_different_images():
    images = np.stack([picture((40, 40), seed) for seed in range(12)])
    boxes, flips = views((40, 40), 32, 12)
    batch = batched_crop(torch.from_numpy(images).permute(0, 3, 1, 2), boxes, flips, 32)
    for image, box, flip, view in zip(images, boxes, flips, batch, strict=True):
        assert difference(view, expected_view(Image.fromarray(image), box, flip, 32)).max() <= 2


def test_pil_view_colours_after_the_crop_and_flips():
    image, box = Image.fromarray(picture((60, 45))), np.array([5, 6, 30, 31])
    row = PLAIN.copy()
    row[5:7] = 2, 1.2
    plain, flipped = (pil_view(image, box, flip, row, 20) for flip in (False, True))
    assert torch.equal(plain, flipped.flip(-1))
    assert (plain == plain[:1]).all()
