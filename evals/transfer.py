"""Logistic regression on frozen features, its L2 penalty chosen on validation images.

The protocol of Kornblith, Shlens and Le, "Do better ImageNet models transfer better?", CVPR 2019, section A.6, as
Ericsson, Gouk and Hospedales, "How well do self-supervised models transfer?", CVPR 2021, run it: multinomial logistic
regression by L-BFGS on features as they are (not normalised), 45 penalties from 1e-6 to 1e5; the best on the validation
images is trained once more on training and validation images together, and tested. The objective is the loss summed
over the images plus l2 / 2 times the squared weights (no bias): scikit-learn's C is 1 / l2.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from tqdm import tqdm

from evals.transfer_metrics import mean_average_precision_11, mean_per_class, top1
from runtime.errors import UserError
from runtime.packages import need_package

PENALTIES = np.logspace(-6, 5, 45)
SEGMENT = 9  # penalties of one warm-started path; fixed, so that the result does not depend on the number of jobs
METRICS = {"top1": top1, "per_class": mean_per_class, "map11": mean_average_precision_11}
NAMES = {"top1": "top-1", "per_class": "mean per class", "map11": "11-point mAP"}


@dataclass(frozen=True)
class Transfer:
    """The result on a set. score, validation: percent of the metric, on the test and validation images. l2: the chosen
    penalty. top1, per_class: of the test images, whatever the metric (None for several labels an image). path: the
    validation score at each of PENALTIES. unconverged: fits of the path that stopped at the largest number of
    iterations."""

    metric: str
    score: float
    validation: float
    l2: float
    top1: float | None
    per_class: float | None
    path: list[float]
    unconverged: int

    @classmethod
    def of(cls, kept: Any) -> Transfer:
        """The inverse of dataclasses.asdict, from JSON. Raises ValueError for anything else."""
        names = [each.name for each in fields(cls)]
        if not isinstance(kept, dict) or sorted(kept) != sorted(names):
            raise ValueError("not the fields of a result")
        numbers = [kept[name] for name in ("score", "validation", "l2", "unconverged")]
        numbers += [kept[name] for name in ("top1", "per_class") if kept[name] is not None]
        if not isinstance(kept["metric"], str) or not isinstance(kept["path"], list) or any(
                isinstance(x, bool) or not isinstance(x, (int, float)) for x in (*numbers, *kept["path"])):
            raise ValueError("not the values of a result")
        return cls(**kept)


def transfer(features: np.ndarray, labels: np.ndarray, validation: np.ndarray, test: np.ndarray,
             test_labels: np.ndarray, metric: str, *, jobs: int = 1, iterations: int = 100, label: str = "transfer",
             progress: bool = False) -> Transfer:
    """The score of a linear classifier on features [n, d] of training and validation images, tested on ``test`` [m, d].

    ``validation``: rows of the n that choose the penalty, int64. ``labels`` [n] int64; for metric 'map11' [n, C] of 1,
    0 (difficult: left out) and -1, and then one classifier a class against the rest. ``jobs``: fits side by side.
    ``iterations``: of L-BFGS, at most, a fit. Raises :class:`UserError` without scikit-learn, or where only one class
    is trained on.
    """
    model = logistic_regression()
    features, test = (np.ascontiguousarray(x, dtype=np.float32) for x in (features, test))
    training = np.setdiff1d(np.arange(len(features)), validation)
    several = labels.ndim == 2
    if not several and len(np.unique(labels[training])) < 2:
        raise UserError(f"{label}: all training images are of one class, and a classifier needs two; give images of "
                        "more classes")
    score = METRICS[metric]
    columns = labels.T if several else labels[None]                             # one problem a row

    def together(answers: list[np.ndarray]) -> np.ndarray:
        return np.stack(answers, axis=1) if several else answers[0]

    x_train, x_val = features[training], features[validation]
    segments = [PENALTIES[::-1][first:first + SEGMENT] for first in range(0, len(PENALTIES), SEGMENT)]
    tasks = [(c, segment) for c in range(len(columns)) for segment in segments]

    with _side_by_side(jobs) as (run, stop), tqdm(total=len(columns) * (len(PENALTIES) + 1), desc=label, unit="fit",
                                                  leave=False, disable=None if progress else True) as bar:
        def path(task: tuple[int, np.ndarray]) -> list[_Fit]:
            found: list[_Fit] = []
            for l2 in task[1]:
                if stop.is_set():
                    break
                start = found[-1] if found else None
                found.append(_Fit.of(model, x_train, columns[task[0]][training], l2, iterations, start, several))
                found[-1].answers = found[-1].answer(x_val)
                bar.update()
            return found

        fits: list[list[_Fit]] = [[] for _ in columns]                          # from the strongest penalty down
        for (column, _), found in zip(tasks, run(path, tasks), strict=True):
            fits[column] += found
        scores = [score(together([each[i].answers for each in fits]), labels[validation])
                  for i in range(len(PENALTIES))]
        best = int(np.argmax(scores))                                           # of equals the strongest
        l2 = float(PENALTIES[::-1][best])

        def final(column: int) -> np.ndarray:
            fit = _Fit.of(model, features, columns[column], l2, iterations, fits[column][best], several)
            bar.update()
            return fit.answer(test)

        answers = together(list(run(final, range(len(columns)))))
    plain = (None, None) if several else (top1(answers, test_labels), mean_per_class(answers, test_labels))
    return Transfer(metric, score(answers, test_labels), scores[best], l2, *plain, scores[::-1],
                    sum(fit.stopped for each in fits for fit in each))


def logistic_regression() -> type:
    """scikit-learn's class. Raises :class:`UserError` if it is not installed."""
    return need_package("scikit-learn", "logistic regression",
                        module="sklearn.linear_model").LogisticRegression


class _Fit:
    """A classifier of all classes, or (``several``) of one against the rest, and its validation predictions."""

    def __init__(self, model: Any, several: bool) -> None:
        self.model, self.several, self.answers = model, several, None
        self.stopped = model is not None and int(model.n_iter_.max()) >= model.max_iter

    @classmethod
    def of(cls, kind: type, features: np.ndarray, labels: np.ndarray, l2: float, iterations: int,
           start: _Fit | None, several: bool) -> _Fit:
        """Trained from where ``start`` ended; of labels 1, 0, -1 the zeros are left out."""
        if several:
            features, labels = features[labels != 0], labels[labels != 0]
            if len(np.unique(labels)) < 2:
                return cls(None, several)
        model = kind(C=1 / l2, max_iter=iterations, warm_start=True)
        if start is not None and start.model is not None and len(start.model.classes_) == len(np.unique(labels)):
            model.coef_, model.intercept_ = start.model.coef_.copy(), start.model.intercept_.copy()
        return cls(model.fit(features, labels), several)

    def answer(self, features: np.ndarray) -> np.ndarray:
        """The class of each image [m], or its score for the one class; zeros of a class that had no image."""
        if self.model is None:
            return np.zeros(len(features))
        return self.model.decision_function(features) if self.several else self.model.predict(features)


@contextmanager
def _side_by_side(jobs: int) -> Iterator[tuple[Callable[..., Iterator[Any]], threading.Event]]:
    """A ``map`` over ``jobs`` threads (the products run outside Python's lock), each with its share of the cores."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    stop = threading.Event()
    with warnings.catch_warnings(), threadpool_limits(1 if jobs > 1 else None), ThreadPoolExecutor(jobs) as pool:
        warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
        try:
            yield pool.map, stop
        finally:
            stop.set()
