"""The check of features: against numbers worked out by hand and a naive vote."""

import numpy as np
import pytest
import torch

from evals.sanity import effective_rank, leave_one_out, mean_cosine, same_image, verdict


def test_effective_rank_of_known_spectra():
    basis = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64)).Q
    centred = basis[:, :8] - basis[:, :8].mean(0)
    left = torch.linalg.qr(centred).Q                           # eight orthonormal columns of mean zero
    assert effective_rank(left) == pytest.approx(8)             # equal singular values: the rank itself
    assert effective_rank(left[:, :1] @ torch.randn(1, 8, dtype=torch.float64)) == pytest.approx(1, abs=1e-3)
    values = torch.tensor([4.0, 2, 1, 1, 0, 0, 0, 0], dtype=torch.float64)
    shares = np.array([0.5, 0.25, 0.125, 0.125])
    assert effective_rank(left * values) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert effective_rank(left * values + 5) == pytest.approx(effective_rank(left * values))  # centred


def test_leave_one_out_is_a_naive_vote_among_the_others():
    features, labels = torch.randn(60, 5), torch.arange(60) % 3
    features[:, 0] += labels
    rows = torch.nn.functional.normalize(features.double(), dim=1)
    right = 0
    for i in range(60):
        cosine = [(float(rows[i] @ rows[j]), j) for j in range(60) if j != i]
        votes = [0.0] * 3
        for value, j in sorted(cosine, reverse=True)[:10]:
            votes[int(labels[j])] += np.exp(value / 0.07)
        right += int(np.argmax(votes)) == int(labels[i])
    assert leave_one_out(features, labels) == pytest.approx(100 * right / 60)
    assert 100 / 3 < leave_one_out(features, labels) < 100


def test_same_image_counts_views_that_find_each_other():
    first = torch.eye(10)
    assert same_image(first, first + 0.01) == 100
    assert same_image(first, first.roll(1, 0)) == 0
    swapped = first[[1, 0, *range(2, 10)]]
    assert same_image(first, swapped) == 80


@pytest.mark.parametrize(("trained", "fresh", "count", "learnt"), [
    (80, 30, 300, True), (33, 30, 300, False), (33, 30, 30_000, True), (30, 30, 10**6, False), (20, 60, 1000, False),
    (100, 100, 100, False), (100, 0, 100, True)])
def test_verdict_is_three_standard_errors(trained, fresh, count, learnt):
    for cosine in (0.1, 0.99):
        assert (verdict(trained, fresh, count, cosine) == "it has learnt") == learnt


def test_features_that_hardly_differ_are_named():
    features = torch.randn(50, 8)
    rows = torch.nn.functional.normalize(features, dim=1)
    pairs = [float(rows[i] @ rows[j]) for i in range(50) for j in range(50) if i != j]
    assert mean_cosine(features) == pytest.approx(np.mean(pairs), abs=1e-5)
    assert mean_cosine(torch.ones(5, 3)) == pytest.approx(1)
    assert "trained too briefly, since the features of different images hardly differ (mean cosine 0.983)" in verdict(
        22.5, 20, 600, 0.983)
    assert verdict(18.4, 16.2, 1000, 0.708).endswith("trained too briefly, damaged, or made for other images")
