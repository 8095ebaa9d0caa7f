"""Nearest and farthest against a full sort in float64, whatever the size of a block."""

import numpy as np
import pytest
import torch

import runtime.search
from runtime.search import top_k


def full_sort(queries, bank, k, self_offset, largest):
    """Ranking by Python's sort of every similarity in float64: lists of (index, similarity), best first."""
    similarity = queries.double().numpy() @ bank.double().numpy().T
    rows = []
    for i, row in enumerate(similarity):
        candidates = [j for j in range(len(row)) if self_offset is None or j != self_offset + i]
        candidates.sort(key=lambda j, row=row: -row[j] if largest else row[j])
        rows.append([(j, row[j]) for j in candidates[:k]])
    return rows


def unit(n, d, seed=0):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=1)


@pytest.fixture(params=[1, 5 * 4 * 60, 256 << 20], ids=["a row a block", "5 rows a block", "one block"])
def _blocks(request, monkeypatch):
    monkeypatch.setattr(runtime.search, "BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 7, 59])
def test_self_search(k, largest):
    bank = unit(60, 16)
    values, ids = top_k(bank, bank, k, self_offset=0, largest=largest)
    expected = full_sort(bank, bank, k, 0, largest)
    assert ids.dtype == torch.int64
    assert values.dtype == torch.float32
    assert ids.tolist() == [[j for j, _ in row] for row in expected]
    np.testing.assert_allclose(values.numpy(), [[v for _, v in row] for row in expected], atol=1e-6)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("largest", [True, False])
def test_other_queries(largest):
    queries, bank = unit(23, 8, 1), unit(60, 8, 2)
    values, ids = top_k(queries, bank, 60, largest=largest)
    assert ids.tolist() == [[j for j, _ in row] for row in full_sort(queries, bank, 60, None, largest)]
    step = values[:, 1:] - values[:, :-1]
    assert ((step <= 0) if largest else (step >= 0)).all()


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("first", [0, 20, 45])
def test_a_ranks_share_knows_itself_by_its_place_in_the_bank(first):
    bank = unit(60, 16)
    whole = top_k(bank, bank, 5, self_offset=0)[1]
    part = top_k(bank[first:first + 15], bank, 5, self_offset=first)[1]
    assert torch.equal(part, whole[first:first + 15])


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("largest", [True, False])
def test_duplicates_do_not_push_self_into_the_list(largest):
    """Of 12 equal images each finds the other 11 at similarity 1, never itself: position says nothing."""
    bank = unit(60, 16)
    bank[10:22] = bank[10]
    values, ids = top_k(bank, bank, 11 if largest else 59, self_offset=0, largest=largest)
    for i in range(60):
        assert i not in ids[i].tolist()
        assert len(set(ids[i].tolist())) == ids.shape[1]
    if largest:
        for i in range(10, 22):
            assert set(ids[i].tolist()) == set(range(10, 22)) - {i}
            assert values[i].min() > 0.9999


def test_without_self_offset_the_image_finds_itself():
    bank = unit(10, 8)
    assert top_k(bank, bank, 1)[1].flatten().tolist() == list(range(10))


def test_inner_product_not_cosine():
    bank = torch.tensor([[1.0, 0.0], [3.0, 3.0]])
    assert top_k(torch.tensor([[1.0, 0.0]]), bank, 1)[1].item() == 1


@pytest.mark.parametrize(("k", "offset"), [(0, None), (-1, None), (11, None), (10, 0), (0, 0)])
def test_impossible_k(k, offset):
    bank = unit(10, 4)
    with pytest.raises(ValueError, match="rows to choose from"):
        top_k(bank, bank, k, self_offset=offset)


def test_inputs_stay():
    queries, bank = unit(5, 4, 1), unit(10, 4)
    before = queries.clone(), bank.clone()
    top_k(queries, bank, 9, self_offset=0)
    assert torch.equal(queries, before[0])
    assert torch.equal(bank, before[1])
