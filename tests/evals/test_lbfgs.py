import numpy as np
import pytest
import torch

from evals import lbfgs
from evals.lbfgs import lbfgs_heads, minimise


def blobs(n=90, d=6, classes=4, empty=False):
    """``empty``: the third class has no image."""
    rng = np.random.default_rng(3)
    labels = np.arange(n) % classes
    labels[(labels == 2) & empty] = 0
    features = 5 + rng.normal(size=(classes, d))[labels] + 1.2 * rng.normal(size=(n, d)) * np.arange(1, d + 1)
    return torch.tensor(features, dtype=torch.float32), torch.from_numpy(labels)


@pytest.mark.parametrize("logits", [1 << 25, 200])
def test_each_decay_is_scikit_learns_minimum(logits, monkeypatch):
    linear_model = pytest.importorskip("sklearn.linear_model")
    monkeypatch.setattr(lbfgs, "LOGITS", logits)  # many rows a product, and few
    features, labels = blobs()
    decays = [1e-3, 0.1, 1.0]
    heads = lbfgs_heads(features, labels, 4, decays, iterations=500, tolerance=1e-6)
    scaled = ((features - features.mean(0)) / features.std(0, unbiased=False)).double().numpy()
    for number, decay in enumerate(decays):
        oracle = linear_model.LogisticRegression(C=1 / (decay * len(labels)), tol=1e-8, max_iter=5000)
        oracle.fit(scaled, labels)
        expected = oracle.decision_function(scaled)
        found = heads.logits(features)[:, number].double().numpy()
        centred = found - found.mean(1, keepdims=True)  # a constant a row is free
        np.testing.assert_allclose(centred, expected - expected.mean(1, keepdims=True), atol=5e-3)
        assert heads.accuracy(features, labels)[number, 0] == pytest.approx(100 * oracle.score(scaled, labels))


def test_a_class_without_images_is_never_chosen():
    features, labels = blobs(empty=True)
    heads = lbfgs_heads(features, labels, 4, [0.1])
    assert 2 not in heads.logits(features)[:, 0].argmax(1)


def test_rows_of_different_scale_do_not_disturb_one_another():
    centre = torch.tensor([[1.0, -2.0], [300.0, 5.0], [0.0, 0.0]])
    curvature = torch.tensor([[1.0, 50.0], [1e-3, 1.0], [1e3, 1.0]])

    def quadratic(theta):
        return (0.5 * curvature * (theta - centre).square()).sum(1).double(), curvature * (theta - centre)

    torch.testing.assert_close(minimise(quadratic, torch.zeros(3, 2), 100, 1e-6), centre, rtol=1e-4, atol=1e-3)


def test_the_minimum_is_left_alone():
    start = torch.ones(2, 3)
    assert minimise(lambda theta: (theta.square().sum(1).double() * 0, theta * 0), start, 5, 1e-6) is start
