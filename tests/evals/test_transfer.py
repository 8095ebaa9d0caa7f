"""The logistic regression of the transfer protocol: its objective, its choice, its answers."""

import json
from dataclasses import asdict

import numpy as np
import pytest

import evals.transfer
from evals.transfer import PENALTIES, Transfer, _Fit, transfer
from evals.transfer_metrics import mean_average_precision_11, mean_per_class
from runtime.errors import UserError


@pytest.fixture
def fewer(monkeypatch):
    """Eleven penalties, for speed."""
    monkeypatch.setattr(evals.transfer, "PENALTIES", PENALTIES[4::4])


def problem(n=120, m=80, d=5, classes=4, seed=0, noise=1.2):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, d))
    labels, test_labels = rng.integers(0, classes, n), rng.integers(0, classes, m)
    return (centres[labels] + noise * rng.normal(size=(n, d)), labels, rng.permutation(n)[:40],
            centres[test_labels] + noise * rng.normal(size=(m, d)), test_labels)


def test_the_penalties_are_the_papers():
    assert len(PENALTIES) == 45
    assert (PENALTIES[0], PENALTIES[-1]) == (pytest.approx(1e-6), pytest.approx(1e5))
    assert np.diff(np.log10(PENALTIES)) == pytest.approx(np.full(44, 0.25))


@pytest.mark.parametrize("l2", [0.5, 30.0])
def test_the_objective_is_the_summed_loss_and_half_the_squared_weights(l2):
    """At the solution its gradient, written out in float64, is zero; with the bias free of the penalty."""
    from sklearn.linear_model import LogisticRegression

    features, labels, *_ = problem()
    model = _Fit.of(LogisticRegression, features, labels, l2, 5000, None, False).model
    logits = features @ model.coef_.T + model.intercept_
    error = np.exp(logits - logits.max(1, keepdims=True))
    error /= error.sum(1, keepdims=True)
    error[np.arange(len(labels)), labels] -= 1
    assert error.T @ features + l2 * model.coef_ == pytest.approx(0, abs=0.05)
    assert error.sum(0) == pytest.approx(0, abs=0.05)
    assert np.abs(error.T @ features).max() > 0.4  # the penalty's part is not small


@pytest.mark.parametrize("metric", ["top1", "per_class"])
def test_the_best_on_validation_is_trained_on_all_and_tested(metric, fewer):
    from sklearn.linear_model import LogisticRegression

    penalties = evals.transfer.PENALTIES
    features, labels, validation, test, test_labels = problem()
    training = np.setdiff1d(np.arange(len(labels)), validation)

    def predict(rows, l2, asked):
        model = LogisticRegression(C=1 / l2, max_iter=5000, tol=1e-6)
        return model.fit(features[rows].astype(np.float32), labels[rows]).predict(asked.astype(np.float32))

    def score(predicted, truth):
        return 100 * np.mean(predicted == truth) if metric == "top1" else mean_per_class(predicted, truth)

    path = [score(predict(training, l2, features[validation]), labels[validation]) for l2 in penalties]
    result = transfer(features, labels, validation, test, test_labels, metric, iterations=5000)
    assert np.abs(np.subtract(result.path, path)).mean() < 0.4  # an image here and there, where two classes are level
    assert result.validation == max(result.path)
    assert result.l2 == penalties[max(i for i, s in enumerate(result.path) if s == result.validation)]
    predicted = predict(np.arange(len(labels)), result.l2, test)
    assert result.score == pytest.approx(score(predicted, test_labels), abs=1.3)
    assert (result.top1 if metric == "top1" else result.per_class) == result.score
    assert result.unconverged == 0
    assert len(set(result.path)) > 2


def test_the_number_of_jobs_changes_nothing(fewer):
    first, second = (transfer(*problem(), "top1", iterations=5, jobs=jobs) for jobs in (1, 3))
    assert first == second
    assert 0 < first.unconverged <= 11


def test_several_labels_an_image_are_one_against_the_rest_without_the_difficult(fewer):
    from sklearn.linear_model import LogisticRegression

    features, labels, validation, test, test_labels = problem()
    marks, test_marks = (2 * (y[:, None] == np.arange(4)) - 1 for y in (labels, test_labels))
    marks[::9, 1] = test_marks[::7, 2] = 0
    result = transfer(features, marks, validation, test, test_marks, "map11", iterations=5000)
    scores = np.zeros(test_marks.shape)
    for c in range(4):
        kept = marks[:, c] != 0
        model = LogisticRegression(C=1 / result.l2, max_iter=5000, tol=1e-6)
        scores[:, c] = model.fit(features[kept], marks[kept, c]).decision_function(test)
    assert result.score == pytest.approx(mean_average_precision_11(scores, test_marks), abs=0.5)
    assert (result.top1, result.per_class) == (None, None)
    assert 30 < result.score < 99


def test_a_class_that_only_validation_shows_and_a_mark_that_nobody_has(fewer):
    features, labels, validation, test, test_labels = problem()
    labels[labels == 3] = 0
    labels[validation[:2]] = 3
    assert transfer(features, labels, validation, test, test_labels, "top1").score > 20
    marks = 2 * (labels[:, None] == np.arange(5)) - 1  # no image has the last
    test_marks = 2 * (test_labels[:, None] == np.arange(5)) - 1
    assert np.isfinite(transfer(features, marks, validation, test, test_marks, "map11").score)


def test_one_class_is_refused():
    features, _, validation, test, test_labels = problem()
    with pytest.raises(UserError, match="one class"):
        transfer(features, np.zeros(len(features), np.int64), validation, test, test_labels, "top1")


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        transfer(*problem(), "top1")


def test_a_result_that_was_kept():
    result = Transfer("top-1", 71.5, 70.0, 1e-3, 71.5, None, [1.0, 2.0], 0)
    kept = json.loads(json.dumps(asdict(result)))
    assert Transfer.of(kept) == result
    for other in ([], 3, None, {}, {**kept, "score": "71"}, {**kept, "path": 3}, {**kept, "path": ["x"]},
                  {**kept, "new": 1}, {**kept, "metric": None}, {**kept, "l2": None}, {**kept, "top1": [1]}):
        with pytest.raises(ValueError, match="of a result"):
            Transfer.of(other)
