"""Retrieval against scikit-learn, loops written from the definitions, and values worked out by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.ranks import on_ranks

from evals.retrieval import average_precision, class_retrieval, precision_at, revisited, trapezoidal_ap
from runtime.device import Process

ALONE = Process(0, 1, torch.device("cpu"))


def test_trapezoids_by_hand():
    # ranks 0 and 2 of three positives: precision 1, 1 at the first; 1/2 before and 2/3 at the second; the third missing
    assert trapezoidal_ap(np.array([0, 2]), 3) == pytest.approx(((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2) / 3)
    assert trapezoidal_ap(np.array([0, 1]), 2) == 1
    assert trapezoidal_ap(np.array([], dtype=np.int64), 2) == 0
    assert trapezoidal_ap(np.array([1]), 1) == pytest.approx((0 + 1 / 2) / 2)


def test_precision_by_hand():
    assert precision_at(np.array([0, 2, 9]), 5) == 2 / 5
    assert precision_at(np.array([0, 2]), 10) == 2 / 3  # its last positive is third
    assert precision_at(np.array([7]), 5) == 0
    assert precision_at(np.array([], dtype=np.int64), 5) == 0


def by_loops(ranking, positive, junk, at):
    """The definition, one image after the other: junk is skipped, and each positive adds a trapezoid."""
    kept = [i for i in ranking if i not in junk]
    area, hits, places = 0.0, 0, []
    for rank, image in enumerate(kept):
        if image in positive:
            area += ((hits / rank if rank else 1) + (hits + 1) / (rank + 1)) / 2 / len(positive)
            hits += 1
            places.append(rank + 1)
    ks = [min(max(places), k) for k in at]
    return [area] + [sum(p <= k for p in places) / k for k in ks]


def test_revisited_against_loops():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(6, 60))
    truth = []
    for _ in range(6):
        ids = generator.permutation(60)
        truth.append({"easy": ids[:7], "hard": ids[7:19], "junk": ids[19:26]})
    truth[1]["easy"] = []                       # without anything easy to find
    truth[2]["junk"] = np.array([], dtype=int)
    found = revisited(torch.from_numpy(scores), truth)
    for name, wanted, ignored in (("easy", ["easy"], ["junk", "hard"]), ("medium", ["easy", "hard"], ["junk"]),
                                  ("hard", ["hard"], ["junk", "easy"])):
        rows = []
        for row, groups in zip(scores, truth, strict=True):
            positive = {int(i) for x in wanted for i in groups[x]}
            if positive:
                junk = {int(i) for x in ignored for i in groups[x]}
                rows.append(by_loops(np.argsort(-row).tolist(), positive, junk, (1, 5, 10)))
        means = 100 * np.mean(rows, axis=0)
        assert [found[name][x] for x in ("mAP", "mP@1", "mP@5", "mP@10")] == pytest.approx(means.tolist())
        assert found[name]["queries"] == len(rows)
    assert found["easy"]["queries"] == 5


def test_junk_is_as_if_it_were_not_there():
    scores = torch.tensor([[9.0, 8, 7, 6, 5]])
    ranked = {"easy": [2], "hard": [3], "junk": [0, 1]}
    found = revisited(scores, [ranked])
    assert [found[x]["mAP"] for x in ("easy", "medium", "hard")] == [100, 100, 100]
    nothing = revisited(scores, [{"easy": [], "hard": [], "junk": [1]}])
    assert nothing["easy"]["queries"] == 0
    assert math.isnan(nothing["easy"]["mAP"])


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_with_ties_is_scikit_learns(seed):
    from sklearn.metrics import average_precision_score

    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 8, (20, 30), generator=generator).float()  # many ties
    relevant = torch.rand(20, 30, generator=generator) < torch.rand(20, 1, generator=generator)
    relevant[0], relevant[1] = True, False
    scores, order = scores.sort(dim=1, descending=True)
    relevant = relevant.gather(1, order)
    found = average_precision(scores, relevant)
    for row in range(20):
        if relevant[row].any():
            assert float(found[row]) == pytest.approx(average_precision_score(relevant[row], scores[row]))
        else:
            assert math.isnan(found[row])


def reference(queries, query_labels, database, labels, at):
    from sklearn.metrics import average_precision_score

    scores = F.normalize(queries.double(), dim=1) @ F.normalize(database.double(), dim=1).T
    aps, recalls = [], []
    for i, row in enumerate(scores):
        others = [j for j in range(len(database)) if database is not queries or j != i]
        right = np.array([labels[j] == query_labels[i] for j in others])
        if right.any():
            aps.append(average_precision_score(right, row[others]))
            order = sorted(range(len(others)), key=lambda j: -row[others[j]])
            recalls.append([right[order[:k]].any() for k in at])
    return 100 * np.mean(aps), (100 * np.mean(recalls, axis=0)).tolist(), len(aps)


@pytest.mark.parametrize("alone", [True, False])
def test_class_retrieval_against_scikit_learn(alone, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 9, (70,), generator=generator)
    labels[11] = 9                                     # a class of one image
    centres = torch.randn(10, 8, generator=generator)
    lengths = torch.rand(70, 1, generator=generator)   # say nothing
    features = lengths * (centres[labels] + 1.5 * torch.randn(70, 8, generator=generator))
    queries = features if alone else features[:12] + 0.3 * torch.randn(12, 8, generator=generator)
    query_labels = labels if alone else torch.cat([labels[:11], torch.tensor([12])])
    at = (1, 2, 4, 8)
    ap, recall, counted = reference(queries, query_labels.tolist(), queries if alone else features, labels.tolist(), at)
    given = (queries, query_labels, None, None) if alone else (queries, query_labels, features, labels)
    found = class_retrieval(*given, ALONE, at)
    assert found["mAP"] == pytest.approx(ap, rel=1e-5)
    assert [found[f"recall@{k}"] for k in at] == pytest.approx(recall)
    assert (found["queries"], found["without_answer"]) == (counted, len(queries) - counted)
    assert counted == len(queries) - 1
    monkeypatch.setitem(__import__("evals.retrieval").retrieval.SCORES, "cpu", 200)  # two or three rows at a time
    assert class_retrieval(*given, ALONE, at) == pytest.approx(found)


def test_a_query_does_not_find_itself_and_finds_its_copy():
    features = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, -1]])
    labels = torch.tensor([0, 0, 1, 1])
    found = class_retrieval(features, labels, None, None, ALONE, (1, 2, 4))
    # the copies find each other first; 2 and 3 lie opposite each other, behind both others
    assert found["recall@1"] == 50
    assert found["recall@2"] == 50
    assert found["recall@4"] == 100
    assert found["mAP"] == pytest.approx(100 * (1 + 1 + 1 / 3 + 1 / 3) / 4)


def test_no_class_with_two_images():
    found = class_retrieval(torch.eye(3), torch.arange(3), None, None, ALONE)
    assert found["queries"] == 0
    assert math.isnan(found["mAP"])


def on_one_rank(rank, features, labels):
    return class_retrieval(features, labels, None, None, Process(rank, 2, torch.device("cpu")))


def test_two_processes_measure_what_one_does(tmp_path):
    features, labels = torch.randn(31, 4), torch.arange(31) % 5
    alone = class_retrieval(features, labels, None, None, ALONE)
    assert on_ranks(2, on_one_rank, tmp_path, features, labels) == [pytest.approx(alone)] * 2
