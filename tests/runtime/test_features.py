"""Features come in the order of the images, and are found again only for exactly what they were made from."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from runtime.device import Process
from runtime.errors import UserError
from runtime.features import cached, extract

ALONE = Process(0, 1, torch.device("cpu"))


class Doubler(nn.Module):
    """Image of value v -> features [v, 2v]; refuses training mode."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.seen.append(len(images))
        return torch.stack([images, 2 * images], dim=1).double()


def loader_of(values, batch=4):
    def make(indices):
        for start in range(0, len(indices), batch):
            chosen = list(indices)[start:start + batch]
            yield (torch.tensor([values[i] for i in chosen]),), torch.tensor(chosen), []
    return make


def nothing(batch):
    return None


@pytest.mark.parametrize("count", [1, 4, 10])
@pytest.mark.parametrize("training", [True, False])
def test_rows_are_in_order_and_the_mode_is_put_back(count, training):
    encoder = Doubler().train(training)
    values = [float((7 * i) % 11) for i in range(count)]
    checked = []
    features = extract(encoder, loader_of(values), count, ALONE, "x", checked.append)
    assert features.dtype == torch.float32
    assert features.tolist() == [[v, 2 * v] for v in values]
    assert encoder.training is training
    assert len(checked) == len(encoder.seen) == -(-count // 4)
    assert not features.requires_grad


def test_check_comes_before_use():
    encoder = Doubler()

    def refuse(batch):
        raise UserError("bad image")

    with pytest.raises(UserError, match="bad image"):
        extract(encoder, loader_of([1.0]), 1, ALONE, "x", refuse)
    assert encoder.seen == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_named(bad):
    values = [1.0, 2.0, 3.0, bad, 5.0, bad]
    with pytest.raises(UserError) as caught:
        extract(Doubler(), loader_of(values), 6, ALONE, "test features", nothing)
    assert "test features" in str(caught.value)
    assert "2 images" in str(caught.value)
    assert "image 3 " in str(caught.value)


IDENTITY = {"sha256": "ab", "data": "cd", "transform": "resize 33", "image_size": 32}


def test_cached(tmp_path):
    made = []

    def compute(value):
        def run():
            made.append(value)
            return torch.full((3, 2), float(value))
        return run

    folder = tmp_path / "features"
    assert cached(folder, IDENTITY, ALONE, compute(1)).tolist() == [[1.0, 1.0]] * 3
    assert cached(folder, dict(reversed(IDENTITY.items())), ALONE, compute(2)).tolist() == [[1.0, 1.0]] * 3
    assert made == [1]
    for key in IDENTITY:
        other = cached(folder, {**IDENTITY, key: "other"}, ALONE, compute(key and 3))
        assert other[0, 0] == 3
    assert made == [1] + [3] * len(IDENTITY)
    assert cached(folder, IDENTITY, ALONE, compute(4))[0, 0] == 1  # the first is still there
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 2 * (1 + len(IDENTITY))
    twins = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert IDENTITY in twins
    for path in folder.glob("*.npy"):
        assert np.load(path, allow_pickle=False).dtype == np.float32


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []
    for _ in range(2):
        cached(None, IDENTITY, ALONE, lambda: made.append(1) or torch.zeros(1, 1))
    assert made == [1, 1]
    assert not list(tmp_path.iterdir())


def test_half_a_cache_entry_is_not_used(tmp_path):
    cached(tmp_path, IDENTITY, ALONE, lambda: torch.zeros(1, 1))
    for path in tmp_path.glob("*.json"):
        path.unlink()
    assert cached(tmp_path, IDENTITY, ALONE, lambda: torch.ones(1, 1)).item() == 1
    assert cached(tmp_path, IDENTITY, ALONE, lambda: torch.zeros(1, 1)).item() == 1
