"""Calibration against a loop, a head's scores against loops in float64, and the corruption errors."""

import math

import numpy as np
import pytest
import torch

import evals.robustness
from evals.calibration import expected_calibration_error
from evals.robustness import ALEXNET, corruption_errors, head_scores


def loop_ece(confidence, right, bins):
    total = 0.0
    for b in range(bins):
        inside = [(c, r) for c, r in zip(confidence, right, strict=True)
                  if b / bins < c <= (b + 1) / bins or (b == 0 and c == 0)]
        if inside:
            gap = abs(np.mean([r for _, r in inside]) - np.mean([c for c, _ in inside]))
            total += gap * len(inside) / len(confidence)
    return 100 * total


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_error_against_a_loop(bins):
    rng = np.random.default_rng(bins)
    confidence, right = rng.random(200), rng.random(200) < 0.6
    found = expected_calibration_error(torch.from_numpy(confidence), torch.from_numpy(right), bins)
    assert found == pytest.approx(loop_ece(confidence, right, bins))


def test_calibration_error_at_the_edges_of_bins():
    confidence, right = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    # (0, .25] with 0 and .25, (.25, .5] with .5, (.5, .75] with .75, (.75, 1] with 1
    expected = (2 * abs(0.5 - 0.125) + abs(0 - 0.5) + abs(1 - 0.75) + 0) / 5
    assert expected_calibration_error(confidence, right, 4) == pytest.approx(100 * expected)


def test_always_sure_and_right_or_wrong():
    ones = torch.ones(10)
    assert expected_calibration_error(ones, ones) == 0
    assert expected_calibration_error(ones, 1 - ones) == 100


@pytest.mark.parametrize("columns", [range(7), (1, 2, 5), (0, 3, 4, 5, 6, 2)])
def test_a_heads_scores_against_loops(columns, monkeypatch):
    monkeypatch.setattr(evals.robustness, "CHUNK", 16)
    columns = np.sort(np.array(columns))
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(50, 4, generator=generator), torch.randn(7, 4, generator=generator)
    labels = columns[np.random.default_rng(1).integers(0, len(columns), 50)]
    found = head_scores(lambda rows: rows @ weight.T, features, labels, columns)
    logits = features.double().numpy() @ weight.double().numpy().T
    top1, top5, everywhere, nll, confidence = [], [], [], [], []
    for row, label in zip(logits, labels, strict=True):
        ranked = sorted(columns, key=lambda c, row=row: -row[c])
        top1.append(ranked[0] == label)
        top5.append(label in ranked[:5])
        everywhere.append(np.argmax(row) == label)
        total = math.fsum(math.exp(row[c]) for c in columns)
        nll.append(-math.log(math.exp(row[label]) / total))
        confidence.append(math.exp(row[ranked[0]]) / total)
    assert found == pytest.approx({"top1": 100 * np.mean(top1), "top5": 100 * np.mean(top5),
                                   "top1_all": 100 * np.mean(everywhere), "nll": np.mean(nll),
                                   "ece": loop_ece(confidence, top1, 15)}, rel=1e-5)
    assert found["top1"] >= found["top1_all"]


def test_equal_logits_are_the_first_class():
    labels, columns = np.array([0, 1, 2]), np.arange(3)
    found = head_scores(lambda rows: torch.zeros(len(rows), 3), torch.zeros(3, 1), labels, columns)
    assert found["top1"] == pytest.approx(100 / 3)
    assert found["nll"] == pytest.approx(math.log(3))
    assert found["ece"] == pytest.approx(0, abs=1e-6)


def test_alexnets_own_errors_are_a_hundred():
    errors = {name: dict(zip(range(1, 6), (error + shift for shift in (-9, -3, 0, 4, 8)), strict=True))
              for name, error in ALEXNET.items()}
    ce, mce = corruption_errors(errors)
    assert len(ce) == 15
    assert ce == pytest.approx(dict.fromkeys(ALEXNET, 100))
    assert mce == pytest.approx(100)


def test_alexnets_errors_of_two_corruptions_are_the_means_of_the_published_severities():
    # by severity, from the same authors: gaussian_noise, shot_noise
    assert ALEXNET["gaussian_noise"] == pytest.approx(np.mean([69.528, 82.542, 93.554, 98.138, 99.452]))
    assert ALEXNET["shot_noise"] == pytest.approx(np.mean([71.224, 85.108, 93.574, 98.182, 99.146]))


def test_what_is_not_whole_has_no_ce():
    whole = {name: dict.fromkeys(range(1, 6), 50.0) for name in ALEXNET}
    ce, mce = corruption_errors(whole)
    assert mce == pytest.approx(np.mean([100 * 50 / error for error in ALEXNET.values()]))
    ce, mce = corruption_errors({**whole, "speckle_noise": dict.fromkeys(range(1, 6), 10.0)})
    assert "speckle_noise" not in ce
    assert mce == pytest.approx(np.mean([100 * 50 / error for error in ALEXNET.values()]))
    ce, mce = corruption_errors({**whole, "fog": {1: 50.0, 2: 50.0}})
    assert "fog" not in ce
    assert mce is None
