"""Evaluation's batches: in order, whole, and of the indices that are asked for."""

import numpy as np
import pytest
import torch
from helpers.noise import IMAGES, SIZE, N, Source, same
from PIL import Image

from data.augment import eval_transform
from data.loader import evaluation_loader


@pytest.mark.parametrize("batch_size", [1, 7, 20, 50])
def test_evaluation_is_in_order_and_whole(batch_size):
    batches = list(evaluation_loader(Source(), SIZE, batch_size, 0))
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(N))
    assert [len(batch.indices) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    pixels = torch.cat([batch.views[0] for batch in batches])
    expected = torch.stack([eval_transform(SIZE)(Image.fromarray(image)) for image in IMAGES])
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize("indices", [[5, 3, 3, 19], range(4, 9), np.array([7, 1]), []])
def test_evaluation_of_some(indices):
    batches = list(evaluation_loader(Source(), SIZE, 3, 0, indices))
    assert [i for batch in batches for i in batch.indices.tolist()] == list(indices)


def test_evaluation_with_workers():
    alone, helped = (list(evaluation_loader(Source([4]), SIZE, 6, workers)) for workers in (0, 2))
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))
