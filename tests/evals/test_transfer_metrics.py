"""Metrics against scikit-learn, values worked out by hand, and the challenge's loop."""

import math
from fractions import Fraction

import numpy as np
import pytest

from evals.transfer_metrics import average_precision_11, mean_average_precision_11, mean_per_class, top1


@pytest.mark.parametrize("seed", range(3))
def test_accuracies_against_scikit_learn(seed):
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, 7, 90), rng.integers(0, 7, 90)
    assert top1(predicted, labels) == pytest.approx(100 * accuracy_score(labels, predicted))
    assert mean_per_class(predicted, labels) == pytest.approx(100 * balanced_accuracy_score(labels, predicted))


def test_a_class_without_test_images_counts_nothing():
    labels, predicted = np.array([0, 0, 0, 0, 3]), np.array([0, 1, 3, 0, 3])
    assert mean_per_class(predicted, labels) == (50 + 100) / 2
    assert top1(predicted, labels) == 60


def test_eleven_points_by_hand():
    # Found: 1 of 1 (recall 1/2), 2 of 3 (recall 1). Recalls 0 to 0.5 have precision 1, 0.6 to 1 have 2/3.
    scores, labels = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([1, -1, 1, -1, -1])
    assert average_precision_11(scores, labels) == pytest.approx(100 * (6 * 1 + 5 * 2 / 3) / 11)
    # The first guess is wrong: no recall has precision 1, not even 0.
    assert average_precision_11(scores, -labels * np.array([1, 1, 1, 1, -1])) == pytest.approx(
        100 * (4 * 1 / 2 + 7 * 2 / 4) / 11)


def test_difficult_images_count_neither_way():
    scores, labels = np.array([0.95, 0.9, 0.8, 0.75, 0.7]), np.array([0, 1, -1, 0, 1])
    kept = labels != 0
    assert average_precision_11(scores, labels) == average_precision_11(scores[kept], labels[kept])
    assert average_precision_11(scores, labels) == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)


def test_equal_scores_are_one_threshold_in_whatever_order_they_come():
    # All four are found at once: precision 1/2 at every recall.
    for labels in ([1, 1, -1, -1], [-1, -1, 1, 1]):
        assert average_precision_11(np.zeros(4), np.array(labels)) == pytest.approx(50)


def test_recalls_are_compared_as_whole_numbers():
    # Ten to find, the first three on top: 3/10 reaches recall 0.3, though 0.1 * 3 > 0.3 in floats.
    labels = np.array([1] * 3 + [-1] * 27 + [1] * 7)
    below = max(Fraction(3 + i, 30 + i) for i in range(1, 8))
    assert average_precision_11(-np.arange(37.0), labels) == pytest.approx(100 * float((4 + 7 * below) / 11))


def challenge(scores, labels):
    """The development kit's loop, for scores without ties."""
    found = wanted = 0
    curve = []
    total = sum(label == 1 for label in labels)
    for _, label in sorted(zip(scores, labels, strict=True), reverse=True):
        if label == 0:
            continue
        found, wanted = found + (label == 1), wanted + 1
        curve.append((Fraction(found, total), Fraction(found, wanted)))
    return float(100 * sum(max((p for r, p in curve if r >= Fraction(t, 10)), default=0) for t in range(11)) / 11)


@pytest.mark.parametrize("seed", range(5))
def test_against_the_challenges_loop(seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice([1, -1, 0], (40, 3), p=[0.3, 0.6, 0.1])
    scores = rng.permutation(120).reshape(40, 3) / 120
    expected = [challenge(scores[:, c].tolist(), labels[:, c].tolist()) for c in range(3)]
    assert [average_precision_11(scores[:, c], labels[:, c]) for c in range(3)] == pytest.approx(expected)
    assert mean_average_precision_11(scores, labels) == pytest.approx(np.mean(expected))


def test_a_class_that_no_test_image_shows_is_left_out_of_the_mean():
    labels = np.array([[1, -1], [-1, 0], [-1, -1]])
    scores = np.array([[0.9, 0.9], [0.1, 0.5], [0.2, 0.1]])
    assert math.isnan(average_precision_11(scores[:, 1], labels[:, 1]))
    assert mean_average_precision_11(scores, labels) == 100
