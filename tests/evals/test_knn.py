"""The weighted vote against loops in Python's floats."""

import math

import pytest
import torch

from evals.knn import PAPER_ROWS, knn_accuracy
from runtime.errors import UserError


def vote(train, train_labels, test, test_labels, num_classes, k, temperature):
    """exp(cosine / T) of the k nearest, summed by class: (top-1, top-5) in percent."""
    def cosine(a, b):
        return math.fsum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(
            math.fsum(x * x for x in a) * math.fsum(y * y for y in b))

    top1 = top5 = 0
    for features, label in zip(test, test_labels, strict=True):
        near = sorted(((cosine(features, other), i) for i, other in enumerate(train)), reverse=True)[:k]
        votes = [0.0] * num_classes
        for similarity, i in near:
            votes[train_labels[i]] += math.exp(similarity / temperature)
        ranked = sorted(range(num_classes), key=lambda c, votes=votes: -votes[c])
        top1 += ranked[0] == label
        # a class without a vote is no answer that can be counted on; only those with one decide here
        top5 += label in [c for c in ranked[:5] if votes[c] > 0]
    return 100 * top1 / len(test), 100 * top5 / len(test)


def problem(n=80, m=40, d=6, classes=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=generator)
    labels = [torch.randint(0, classes, (count,), generator=generator) for count in (n, m)]
    features = [centres[label] + 1.3 * torch.randn(len(label), d, generator=generator) for label in labels]
    scale = torch.rand(n, 1, generator=generator) * 10 + 0.1  # lengths say nothing
    return features[0] * scale, labels[0], features[1], labels[1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (10, 0.07), (10, 1.0), (20, 0.07), (50, 0.07), (80, 0.5)])
def test_against_loops(k, temperature, seed):
    train, train_labels, test, test_labels = problem(seed=seed)
    expected = vote(train.double().tolist(), train_labels.tolist(), test.double().tolist(), test_labels.tolist(), 8,
                    k, temperature)
    row, = knn_accuracy(train, train_labels, test, test_labels, 8, [(k, temperature)])
    assert (row["k"], row["T"]) == (k, temperature)
    assert row["top1"] == pytest.approx(expected[0])
    if k >= 20:  # with fewer neighbours fewer than five classes may have a vote, and ties at zero decide
        assert row["top5"] == pytest.approx(expected[1])
    assert 0 < row["top1"] < 100


def test_rows_from_one_search_equal_separate_ones():
    train, train_labels, test, test_labels = problem()
    together = knn_accuracy(train, train_labels, test, test_labels, 8)
    assert [(row["k"], row["T"]) for row in together] == list(PAPER_ROWS) == [
        (10, 0.07), (10, 1.0), (20, 0.07), (50, 0.07)]
    for row in together:
        alone, = knn_accuracy(train, train_labels, test, test_labels, 8, [(row["k"], row["T"])])
        assert alone == row
    assert len({row["top1"] for row in together}) > 1


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_with_at_most_five_classes_top5_is_everything(classes):
    train, train_labels, test, test_labels = problem(classes=classes)
    row, = knn_accuracy(train, train_labels, test, test_labels, classes, [(20, 0.07)])
    assert row["top5"] == 100.0
    assert row["top1"] < 100


def test_a_small_temperature_is_the_nearest_and_does_not_overflow():
    train, train_labels, test, test_labels = problem()
    nearest, = knn_accuracy(train, train_labels, test, test_labels, 8, [(1, 1.0)])
    cold, = knn_accuracy(train, train_labels, test, test_labels, 8, [(50, 1e-5)])
    assert cold["top1"] == nearest["top1"]


def test_a_class_that_only_the_training_images_have():
    train, train_labels, test, test_labels = problem()
    row, = knn_accuracy(train, train_labels, test, test_labels, 20, [(20, 0.07)])
    same, = knn_accuracy(train, train_labels, test, test_labels, 8, [(20, 0.07)])
    assert row == same


def test_more_neighbours_than_images():
    with pytest.raises(UserError, match="81 is more neighbours than the 80"):
        knn_accuracy(*problem(), 8, [(10, 0.07), (81, 0.07)])


def test_itself_in_the_bank_is_found():
    train, train_labels, _, _ = problem()
    row, = knn_accuracy(train, train_labels, train, train_labels, 8, [(1, 0.07)])
    assert row["top1"] == 100.0
