import math

import numpy as np
import pytest
import torch

from evals.metrics import accuracy, places


def test_top_k_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 9)), rng.integers(0, 9, 200)
    expected = [100 * metrics.top_k_accuracy_score(labels, logits, k=k, labels=range(9)) for k in (1, 2, 5)]
    assert accuracy(torch.from_numpy(logits), torch.from_numpy(labels), (1, 2, 5)) == pytest.approx(expected)


def test_of_equal_logits_the_lower_class_stands_first():
    metrics = pytest.importorskip("sklearn.metrics")
    logits = torch.tensor([[1.0, 1, 1], [0, 2, 2], [2, 0, 2]])
    assert places(logits, torch.tensor([2, 1, 2])).tolist() == [2, 0, 1]
    assert places(torch.zeros(4, 7), torch.full((4,), 3)).tolist() == [3] * 4
    expected = 100 * metrics.accuracy_score([2, 1, 2], logits.numpy().argmax(1))
    assert accuracy(logits, torch.tensor([2, 1, 2]), [1]) == pytest.approx([expected])


def test_a_logit_that_is_not_a_number_is_a_miss():
    logits = torch.tensor([[math.nan, 0.0], [0.0, math.nan], [math.nan, math.nan]])
    assert places(logits, torch.tensor([0, 1, 0])).tolist() == [2, 2, 2]


def test_more_than_there_are_classes_and_no_image():
    assert accuracy(torch.tensor([[0.0, 1.0]]), torch.tensor([0])) == [0, 100]
    assert all(math.isnan(x) for x in accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)))


def test_leading_dimensions():
    logits = torch.randn(4, 3, 6)
    labels = torch.tensor([0, 5, 2, 1])
    together = places(logits, labels[:, None].expand(4, 3))
    assert torch.equal(together, torch.stack([places(logits[:, i], labels) for i in range(3)], 1))
