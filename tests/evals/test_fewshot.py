"""Episodes, the nearest mean against loops, and the interval."""

import numpy as np
import pytest
import torch

import evals.fewshot
from evals.fewshot import episodes, few_shot, nearest_centroid
from runtime.errors import UserError


def images(classes=8, each=30, d=6, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(each)
    features = torch.randn(classes, d, generator=generator)[labels]
    return features + noise * torch.randn(len(labels), d, generator=generator), labels.numpy()


def test_an_episode_has_different_classes_and_different_images():
    _, labels = images()
    drawn = episodes(labels, 5, 12, 50, seed=3)
    assert drawn.shape == (50, 5, 12)
    for episode in drawn:
        assert len(np.unique(episode)) == 60
        assert (labels[episode] == labels[episode[:, :1]]).all()
        assert len(np.unique(labels[episode[:, 0]])) == 5
    assert (drawn == episodes(labels, 5, 12, 50, seed=3)).all()
    assert (drawn != episodes(labels, 5, 12, 50, seed=4)).any()
    assert set(np.unique(drawn)) == set(range(len(labels)))  # every image has its turn


def test_a_class_with_too_few_images_is_left_out_and_too_few_classes_are_refused():
    labels = np.repeat(np.arange(6), [20, 20, 20, 20, 20, 7])
    assert episodes(labels, 5, 8, 20, 0).max() < 100
    with pytest.raises(UserError, match="5 classes have so many"):
        episodes(labels, 6, 8, 20, 0)


def test_nearest_mean_against_loops():
    generator = torch.Generator().manual_seed(1)
    support, query = (torch.randn(7, 4, n, 5, generator=generator) + torch.randn(7, 4, 1, 5, generator=generator)
                      for n in (3, 6))
    for episode in range(7):
        means = [np.mean(support[episode, way].double().numpy(), axis=0) for way in range(4)]
        right = [way == int(np.argmin([np.sum((q - mean) ** 2) for mean in means]))
                 for way in range(4) for q in query[episode, way].double().numpy()]
        assert float(nearest_centroid(support, query)[episode]) == pytest.approx(np.mean(right))


@pytest.mark.parametrize("head", evals.fewshot.HEADS)
def test_the_mean_and_its_interval(head, monkeypatch):
    features, labels = images()
    options = {"head": head, "ways": 4, "shots": 3, "queries": 5, "count": 12, "seed": 2}
    result = few_shot(features, labels, **options)
    score = nearest_centroid if head == "centroid" else evals.fewshot._logistic
    rows = features[torch.from_numpy(episodes(labels, 4, 8, 12, 2))]
    shares = 100 * score(rows[:, :, :3], rows[:, :, 3:]).double().numpy()
    assert result.accuracy == pytest.approx(shares.mean())
    assert result.interval == pytest.approx(1.96 * shares.std(ddof=1) / np.sqrt(12))
    assert 30 < result.accuracy < 99
    monkeypatch.setattr(evals.fewshot, "NUMBERS_AT_ONCE", 1)  # an episode at a time
    assert few_shot(features, labels, **options) == result


@pytest.mark.parametrize("head", evals.fewshot.HEADS)
def test_far_apart_is_all_right_and_alike_is_chance(head):
    features, labels = images(noise=1e-3)
    assert few_shot(features, labels, head, count=5).accuracy == 100
    features = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    chance = few_shot(features, labels, head, count=25, queries=10)
    assert abs(chance.accuracy - 20) < 4 * chance.interval


def test_logistic_regression_looks_at_directions_alone():
    features, labels = images()
    scale = torch.rand(len(features), 1, generator=torch.Generator().manual_seed(0)) * 50 + 0.1
    first, second = (few_shot(x, labels, "logistic", count=10) for x in (features, features * scale))
    assert first.accuracy == pytest.approx(second.accuracy, abs=0.5)
