"""The k-NN score during training, on a tree of plain colours."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import evals.monitor
from evals.monitor import KnnMonitor
from runtime.device import Process
from runtime.errors import UserError

ALONE = Process(0, 1, torch.device("cpu"))
COLOURS = {"blue": (10, 10, 220), "green": (10, 220, 10), "red": (220, 10, 10)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + rng.integers(-9, 9, (20, 20, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


class MeanColour(nn.Module):
    """Tells the classes apart without fail; ``blind`` tells nothing, its features are noise."""

    def __init__(self, blind=False):
        super().__init__()
        self.blind, self.count = blind, 0
        self.norm = nn.BatchNorm1d(3)

    def forward(self, images):
        assert not self.training
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 16, 16)
        self.count += len(images)
        features = images.float().mean(dim=(2, 3)) - 90
        return torch.randn_like(features) if self.blind else features


@pytest.mark.parametrize("data", ["", "train"])
def test_found_from_the_training_folder_or_above(root, data):
    monitor = KnnMonitor.open(str(root / data), None, 16, 0, ALONE)
    encoder = MeanColour().train()
    random = torch.get_rng_state()
    assert monitor.score(encoder) == 100.0
    assert torch.equal(torch.get_rng_state(), random)  # looking does not change the training
    assert encoder.training
    assert encoder.count == 36 + 12
    assert encoder.norm.num_batches_tracked == 0
    assert "12" in monitor.description
    assert "36" in monitor.description


def test_an_encoder_that_sees_nothing_scores_about_chance(root):
    assert KnnMonitor.open(str(root), None, 16, 0, ALONE).score(MeanColour(blind=True)) < 90


def test_slices_are_even(root, monkeypatch):
    monkeypatch.setattr(evals.monitor, "BANK", 12)
    monkeypatch.setattr(evals.monitor, "QUERIES", 6)
    monitor = KnnMonitor.open("somewhere else", str(root), 16, 0, ALONE)
    assert np.bincount(monitor.train.labels).tolist() == [4, 4, 4]
    assert np.bincount(monitor.test.labels).tolist() == [2, 2, 2]
    encoder = MeanColour()
    assert monitor.score(encoder) == 100.0
    assert encoder.count == 18


def test_images_that_cannot_be_opened(root, tmp_path, monkeypatch):
    copy = shutil.copytree(root, tmp_path / "copy")
    for name in ("train/red/0.png", "val/blue/1.png"):
        (copy / name).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"0\.png .*--on-bad-image skip"):
        KnnMonitor.open(str(copy), None, 16, 0, ALONE).score(MeanColour())
    encoder = MeanColour()
    assert KnnMonitor.open(str(copy), None, 16, 0, ALONE, "skip").score(encoder) == 100.0
    monkeypatch.setattr(evals.monitor, "K", 36)
    with pytest.raises(UserError, match="--knn-every: of .* 35 images are readable .* at least 36"):
        KnnMonitor.open(str(copy), None, 16, 0, ALONE, "skip").score(MeanColour())


def test_too_few_images_are_known_at_the_start(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    for path in (copy / "train").rglob("*.png"):
        if path.name not in ("1.png", "2.png", "3.png"):
            path.unlink()
    for data, knn_data in ((str(copy), None), ("elsewhere", str(copy))):
        with pytest.raises(UserError, match="--knn-every takes the 10 nearest of the training images, .* holds 9"):
            KnnMonitor.open(data, knn_data, 16, 0, ALONE)


def test_without_labels(root, tmp_path):
    with pytest.raises(UserError, match="--knn-every needs labelled images") as caught:
        KnnMonitor.open(str(tmp_path), None, 16, 0, ALONE)
    assert "--knn-data" in str(caught.value)
    with pytest.raises(UserError, match=r"^--knn-data ") as caught:
        KnnMonitor.open(str(root), str(tmp_path / "nowhere"), 16, 0, ALONE)
    assert "nowhere" in str(caught.value)
