"""The check of features: against numbers worked out by hand and a naive vote."""

import numpy as np
import pytest
import torch

from evals.sanity import effective_rank, gain, leave_one_out, mean_cosine, same_image, verdict


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
    assert int(leave_one_out(features, labels).sum()) == right
    assert 20 < right < 60


def test_same_image_counts_views_that_find_each_other():
    first = torch.eye(10)
    assert same_image(first, first + 0.01).all()
    assert not same_image(first, first.roll(1, 0)).any()
    swapped = first[[1, 0, *range(2, 10)]]
    assert same_image(first, swapped).tolist() == [False] * 2 + [True] * 8


def hits(both, trained, fresh, neither):
    """What two networks get right of so many images: bool [n] each."""
    cells = torch.tensor([both, trained, fresh, neither])
    return torch.tensor([True, True, False, False]).repeat_interleave(cells), torch.tensor(
        [True, False, True, False]).repeat_interleave(cells)


@pytest.mark.parametrize(("cells", "said"), [
    ((30, 50, 0, 20), "it has learnt"), ((60, 36, 12, 492), "it has learnt"),  # 4 points of 600, seldom the other way
    ((60, 84, 60, 396), "600 images are too few to tell: 4.0 ± 6.0 points"),   # 4 points of 600 that may be chance
    ((6000, 8400, 6000, 39600), "it has learnt"), ((0, 0, 0, 20), "20 images are too few to tell: 0.0 ± 13.6 points"),
    ((900, 550, 550, 0), "no better"), ((0, 0, 0, 2000), "no better"), ((100, 0, 200, 700), "no better")])
def test_the_verdict_takes_the_number_of_images_into_account(cells, said):
    for cosine in (0.1, 0.99):
        assert verdict(*hits(*cells), cosine).startswith(said)


def test_the_error_of_a_gain_is_that_of_many_samples():
    """Of a thousand samples of 600 images, of which the network alone gets 15 %, fresh weights alone 11 %."""
    chance = torch.rand(1000, 600, generator=torch.Generator().manual_seed(0))
    found = [gain((x < 0.4) | (x > 0.85), (x < 0.4) | ((x > 0.74) & (x < 0.85))) for x in chance]
    points, errors = map(np.array, zip(*found, strict=True))
    assert points.mean() == pytest.approx(4, abs=0.2)
    assert errors.mean() == pytest.approx(points.std(), rel=0.07)


@pytest.mark.parametrize(("signal", "said"), [(0.0, "no better"), (1.5, "it has learnt")])
def test_features_with_and_without_their_classes(signal, said):
    """Features of 2,000 images in ten classes beside others without; a tenth of them leaves the first in doubt."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2000) % 10
    fresh = torch.randn(2000, 16, generator=generator)
    own = torch.randn(2000, 16, generator=generator)
    own[torch.arange(2000), labels] += signal
    assert verdict(leave_one_out(own, labels), leave_one_out(fresh, labels), 0.5).startswith(said)
    few = verdict(leave_one_out(own[:200], labels[:200]), leave_one_out(fresh[:200], labels[:200]), 0.5)
    assert few.startswith("200 images are too few" if not signal else said)


def test_features_that_hardly_differ_are_named():
    features = torch.randn(50, 8)
    rows = torch.nn.functional.normalize(features, dim=1)
    pairs = [float(rows[i] @ rows[j]) for i in range(50) for j in range(50) if i != j]
    assert mean_cosine(features) == pytest.approx(np.mean(pairs), abs=1e-5)
    assert mean_cosine(torch.ones(5, 3)) == pytest.approx(1)
    same = hits(300, 100, 100, 1500)
    assert "trained too briefly, since the features of different images hardly differ (mean cosine 0.983)" in verdict(
        *same, 0.983)
    assert verdict(*same, 0.708).endswith("trained too briefly, damaged, or made for other images")
    assert verdict(*hits(3, 1, 1, 15), 0.983).endswith("hardly differ (mean cosine 0.983), as after too brief a "
                                                       "training")
