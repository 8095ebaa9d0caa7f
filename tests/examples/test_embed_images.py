"""examples/embed_images.py as a user runs it, and the README's lines of Python."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.scripts import script
from PIL import Image
from torchvision.transforms.functional import normalize

from checkpoints.frozen import load_frozen
from data.augment import eval_transform

ROOT = Path(__file__).resolve().parents[2]
TEACHER = ROOT / "assets" / "demo_teacher.pth"
SIZE = 64


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (80, 70 + 9 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def embedded(path):
    """Its features one image at a time, by torchvision's normalisation and the bare trunk."""
    encoder, report = load_frozen(TEACHER)
    pixels = eval_transform(SIZE)(Image.open(path)).float() / 255
    with torch.no_grad():
        return encoder.backbone(normalize(pixels, report.mean, report.std)[None])[0].numpy()


def example(*words):
    return script("examples/embed_images.py", *words)


def test_it_embeds_a_folder(photos, tmp_path):
    done = example(TEACHER, photos, tmp_path / "features.npz")
    assert (done.rc, done.err) == (0, "")
    assert done.out.endswith("features.npz: 3 images, 512 numbers each\n")
    with np.load(tmp_path / "features.npz") as found:
        assert list(found["names"]) == ["0.png", "1.png", "2.png"]
        expected = np.stack([embedded(photos / name) for name in found["names"]])
        assert found["features"].dtype == np.float32
        np.testing.assert_allclose(found["features"], expected, rtol=1e-4, atol=1e-4)


def test_an_unreadable_image_is_named_and_nothing_is_written(photos, tmp_path):
    (photos / "1.png").write_bytes(b"not an image")
    done = example(TEACHER, photos, tmp_path / "features.npz")
    assert done.rc == 2
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and "1.png is unreadable" in done.err
    assert not (tmp_path / "features.npz").exists()


def test_the_readmes_python_embeds_an_image(photos):
    code, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    code = code.replace('"runs/demo/student/student.pth"', repr(str(TEACHER)))
    code = code.replace('"photo.jpg"', repr(str(photos / "0.png")))
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, names)  # noqa: S102 - our own README
    np.testing.assert_allclose(names["features"][0], embedded(photos / "0.png"), rtol=1e-4, atol=1e-4)
