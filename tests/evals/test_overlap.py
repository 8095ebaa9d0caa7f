"""Overlap of two spaces against scikit-learn, and against the formulas written out in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.ranks import on_ranks

from evals.overlap import cosines, neighbourhoods, ranks_of, shared_neighbours, similarity, usable_ks
from evals.sanity import effective_rank
from runtime.device import Process

ALONE = Process(0, 1, torch.device("cpu"))


def spaces(n=120, d_t=9, d_s=5, noise=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(n, d_t, generator=generator) * torch.linspace(2, 0.2, d_t) + 0.3
    student = teacher @ torch.randn(d_t, d_s, generator=generator) + noise * torch.randn(n, d_s, generator=generator)
    return teacher, student


def cosine_order(x):
    """Every image's others, nearest first, by float64 cosines."""
    x = F.normalize(x.double(), dim=1)
    scores = x @ x.T
    scores.fill_diagonal_(-2)
    return scores.argsort(dim=1, descending=True, stable=True)[:, :-1]


@pytest.mark.parametrize("seed", range(3))
def test_neighbourhoods_against_scikit_learn_and_sets(seed):
    from sklearn.manifold import trustworthiness

    teacher, student = spaces(seed=seed)
    ks = [1, 5, 11, 31]
    found = neighbourhoods(teacher, student, ks, ALONE)
    orders = [[row[:max(ks)] for row in cosine_order(x).tolist()] for x in (teacher, student)]
    unit = [F.normalize(x.double(), dim=1).numpy() for x in (teacher, student)]
    for k in ks:
        shares = [len(set(a[:k]) & set(b[:k])) / k for a, b in zip(*orders, strict=True)]
        assert found["shared"][k] == pytest.approx(100 * np.mean(shares))
        # of unit rows the Euclidean order is that of cosines
        assert found["trustworthiness"][k] == pytest.approx(trustworthiness(unit[0], unit[1], n_neighbors=k))
        assert found["continuity"][k] == pytest.approx(trustworthiness(unit[1], unit[0], n_neighbors=k))
    assert found["shared"] == pytest.approx(shared_neighbours(teacher, student, ks))
    assert 0 < found["shared"][11] < 100
    assert found["trustworthiness"][11] != pytest.approx(found["continuity"][11])


def test_a_space_overlaps_with_itself_turned_and_stretched():
    teacher, _ = spaces()
    turn = torch.linalg.qr(torch.randn(9, 9)).Q
    found = neighbourhoods(teacher, 3 * teacher @ turn, [5, 21], ALONE)
    assert found["shared"] == pytest.approx({5: 100, 21: 100})
    assert found["trustworthiness"] == found["continuity"] == {5: 1, 21: 1}


def test_by_hand():
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.3], [1.0, 0.6]])   # 0-1-2-3 along an arc
    student = teacher[[0, 2, 1, 3]]                                             # 1 and 2 have changed places
    found = neighbourhoods(teacher, student, [1], ALONE)
    # nearest of 0, 1, 2, 3 in the teacher's space: 1, 0, 1, 2; in the student's: 2, 2, 0, 1
    assert found["shared"][1] == 0
    # in degrees the images lie at 0, 5.7, 16.7 and 31, which ranks those in the teacher's space so:
    assert ranks_of(torch.tensor([[2], [2], [0], [1]]), teacher, range(4), torch.device("cpu")).tolist() == [
        [2], [2], [3], [2]]
    assert found["trustworthiness"][1] == pytest.approx(1 - 2 * (1 + 1 + 2 + 1) / (4 * 1 * (8 - 3 - 1)))


def test_ranks_with_ties_and_of_part_of_the_rows(monkeypatch):
    space = torch.tensor([[1.0, 0], [2, 0], [0, 1], [3, 0], [0, 0], [1, 1]])
    ids = torch.tensor([[5, 3, 1, 2], [0, 2, 3, 4], [4, 0, 5, 1], [0, 1, 2, 5]])
    expected = torch.tensor([[3, 2, 1, 4], [1, 4, 2, 5], [5, 2, 1, 3], [1, 2, 4, 3]])  # equal ones in their order
    assert ranks_of(ids, space, range(4), torch.device("cpu")).equal(expected)
    monkeypatch.setitem(__import__("evals.overlap").overlap.SCORES, "cpu", 6)
    assert ranks_of(ids[1:3], space, range(1, 3), torch.device("cpu")).equal(expected[1:3])


def test_a_collapsed_student_is_no_better_than_chance():
    teacher, _ = spaces(n=200)
    found = neighbourhoods(teacher, torch.ones(200, 3), [11], ALONE)
    assert found["shared"][11] < 15  # 5.5 by chance
    assert 0.4 < found["trustworthiness"][11] < 0.6
    assert 0.4 < found["continuity"][11] < 0.6
    alike = similarity(teacher, torch.ones(200, 3), torch.ones(200, 9), ALONE)
    assert alike["cka"] == alike["cka_unbiased"] == alike["dimension_correlation"] == 0
    assert alike["effective_rank"] == 1  # of nothing


def hsic_unbiased(k, m):
    """Song et al., JMLR 2012, equation 5, as it stands there."""
    n = len(k)
    k, m, ones = k - np.diag(np.diag(k)), m - np.diag(np.diag(m)), np.ones(n)
    return (np.trace(k @ m) + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * ones @ k @ m @ ones) / (n * (n - 3))


def hsic(k, m):
    """Gretton et al., ALT 2005: tr(K H L H) / (n - 1)^2."""
    h = np.eye(len(k)) - 1 / len(k)
    return np.trace(k @ h @ m @ h) / (len(k) - 1) ** 2


@pytest.mark.parametrize(("n", "d_t", "d_s"), [(40, 9, 5), (12, 20, 30)])
def test_cka_against_gram_matrices(n, d_t, d_s):
    teacher, student = spaces(n, d_t, d_s)
    grams = [x.double().numpy() @ x.double().numpy().T for x in (teacher, student)]
    found = similarity(teacher, student, None, ALONE)
    for name, of in (("cka", hsic), ("cka_unbiased", hsic_unbiased)):
        expected = of(*grams) / math.sqrt(of(grams[0], grams[0]) * of(grams[1], grams[1]))
        assert found[name] == pytest.approx(expected, rel=1e-9), name
    assert found["row_cosine"] is found["space_cosine"] is found["dimension_correlation"] is None
    assert found["teacher_effective_rank"] == pytest.approx(effective_rank(teacher.double()), rel=1e-5)
    assert found["effective_rank"] == pytest.approx(effective_rank(student.double()), rel=1e-5)


def test_cka_of_unrelated_spaces_with_few_images():
    generator = torch.Generator().manual_seed(0)
    found = similarity(*(torch.randn(60, 300, generator=generator) for _ in range(2)), None, ALONE)
    assert found["cka"] > 0.7                       # says nothing: 60 images in 300 dimensions
    assert abs(found["cka_unbiased"]) < 0.05


def test_cosines_against_numpy():
    teacher, noise = spaces(50, 6, 6)
    projected = 0.6 * teacher + 0.4 * noise
    projected[:, 2] = 0.7          # constant: correlated with nothing
    projected[3] = 0               # a dead row
    projected[:, 4] = 0            # a dead column
    found = cosines(teacher, projected, ALONE)
    t, s = teacher.double().numpy(), projected.double().numpy()
    rows = [0 if i == 3 else t[i] @ s[i] / np.linalg.norm(t[i]) / np.linalg.norm(s[i]) for i in range(50)]
    columns = [0 if j == 4 else t[:, j] @ s[:, j] / np.linalg.norm(t[:, j]) / np.linalg.norm(s[:, j]) for j in range(6)]
    pearson = [0 if j == 4 else np.corrcoef(t[:, j], s[:, j])[0, 1] for j in range(6)]
    assert found["row_cosine"] == pytest.approx(np.mean(rows))
    assert found["space_cosine"] == pytest.approx(np.mean(columns))
    assert found["dimension_correlation"] == pytest.approx(np.mean(pearson))
    constant = projected.clone()
    constant[:] = torch.arange(6)
    assert cosines(teacher, constant, ALONE)["dimension_correlation"] == 0


def test_sums_do_not_depend_on_how_many_rows_are_taken_at_a_time(monkeypatch):
    teacher, student = spaces(100, 5, 5)
    whole = similarity(teacher, student, student, ALONE)
    monkeypatch.setattr("evals.overlap.ROWS", 7)
    assert similarity(teacher, student, student, ALONE) == pytest.approx(whole, rel=1e-9)


def test_half_precision_features_are_taken_as_they_are():
    teacher, student = (x.half() for x in spaces())
    assert similarity(teacher, student, None, ALONE)["cka"] == pytest.approx(
        similarity(teacher.float(), student.float(), None, ALONE)["cka"])
    assert neighbourhoods(teacher, student, [5], ALONE) == neighbourhoods(teacher.float(), student.float(), [5], ALONE)


def test_ks_that_fit():
    assert usable_ks(100) == [1, 5, 11, 21, 31]
    assert usable_ks(100, [50, 49, 3, 3]) == [3, 49]
    with pytest.raises(ValueError, match="below half"):
        neighbourhoods(*spaces(20), [10], ALONE)
    with pytest.raises(ValueError, match="3 images"):
        similarity(*spaces(3), None, ALONE)


def on_one_rank(rank, teacher, student):
    process = Process(rank, 2, torch.device("cpu"))
    return neighbourhoods(teacher, student, [5], process), similarity(teacher, student, student, process)


def test_two_processes_measure_what_one_does(tmp_path):
    teacher, student = spaces(41, 6, 6)
    alone = neighbourhoods(teacher, student, [5], ALONE), similarity(teacher, student, student, ALONE)
    for found in on_ranks(2, on_one_rank, tmp_path, teacher, student):
        assert found[0] == alone[0]
        assert found[1] == pytest.approx(alone[1])
