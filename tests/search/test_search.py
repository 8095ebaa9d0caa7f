"""Nearest and farthest against a full sort in float64, whatever the memory, the split and the numbers' type."""

import numpy as np
import pytest
import torch

from runtime.errors import UserError
from search import candidates, exact
from search.candidates import OnGpu, capacity, decode, encode
from search.exact import search, top_k

MEMORY = {"a row at a time": (1, 1 << 20), "some panels": (400_000, 1 << 20), "panels of blocks": (900_000, 900),
          "a panel of blocks": (1 << 28, 900), "one block": (1 << 28, 1 << 20)}  # bytes, scores of a tile


@pytest.fixture(params=["cpu", "card"])
def _both_ways(request, monkeypatch):
    """The card's way of sifting runs on a CPU too."""
    if request.param == "card":
        monkeypatch.setattr(exact, "candidates", OnGpu)
        monkeypatch.setattr(candidates, "PIECE", 3000)
    else:
        monkeypatch.setattr(candidates, "STRIP", 3000)


@pytest.fixture(params=MEMORY.values(), ids=MEMORY)
def memory(request, monkeypatch):
    monkeypatch.setitem(exact.TILE, "cpu", request.param[1])
    return request.param[0]


def scores64(queries, bank, metric):
    q, b = queries.double().numpy(), bank.double().numpy()
    if metric == "cosine":
        q, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (q, b))
    if metric == "l2":
        return ((q[:, None] - b[None]) ** 2).sum(2)
    return q @ b.T


def full_sort(queries, bank, k, self_offset=None, largest=True, metric="inner"):
    """Ids and values of a stable sort of every score in float64: equal ones in the order of their indices."""
    scores = scores64(queries, bank, metric)
    order = np.argsort(scores if (metric == "l2") == largest else -scores, axis=1, kind="stable")
    if self_offset is not None:
        own = self_offset + np.arange(len(queries))[:, None]
        order = order[order != own].reshape(len(queries), -1)
    order = order[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


def assert_exact(found, expected):
    assert found[0].dtype == torch.float32
    assert found[1].dtype == torch.int64
    np.testing.assert_array_equal(found[1].numpy(), expected[0])
    np.testing.assert_array_equal(found[0].numpy(), expected[1])


def whole_numbers(n, d=5, seed=0, most=3):
    """Small integers, whose products float32 has exactly: many ties, copies and zero rows."""
    x = torch.randint(-most, most + 1, (n, d), generator=torch.Generator().manual_seed(seed)).float()
    x[n // 3:n // 3 + 12] = x[0]
    x[n // 2:n // 2 + 9] = 0
    return x


def unit(n, d, seed=0):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=1)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("metric", ["inner", "l2"])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(("n", "k"), [(60, 1), (60, 7), (60, 59), (130, 5)])
def test_self_search_is_a_full_sort_with_ties_by_index(n, k, largest, metric, memory):
    bank = whole_numbers(n)
    assert_exact(top_k(bank, bank, k, self_offset=0, largest=largest, metric=metric, memory=memory),
                 full_sort(bank, bank, k, 0, largest, metric))


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(("n", "k"), [(61, 61), (300, 5)])
def test_other_queries(n, k, largest, memory):
    queries, bank = whole_numbers(43, seed=1), whole_numbers(n, seed=2)
    assert_exact(top_k(queries, bank, k, largest=largest, memory=memory), full_sort(queries, bank, k, None, largest))


@pytest.mark.usefixtures("_both_ways")
def test_nothing_but_ties(memory):
    """All rows zero: everything passes every threshold, and the lowest indices are the answer."""
    bank = torch.zeros(200, 4)
    ids = top_k(bank, bank, 9, self_offset=0, memory=memory)[1]
    assert ids[20:].tolist() == [list(range(9))] * 180
    assert ids[3].tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("rows", [range(130), range(13, 14), range(50, 117), range(100, 130)])
def test_a_ranks_share_is_that_part_of_the_whole(rows, memory):
    bank = whole_numbers(130)
    ids, values = full_sort(bank, bank, 6, 0)
    at = rows.start
    for block in search(None, bank, 6, rows=rows, memory=memory):
        assert block.first + rows.start == at
        place = slice(at, at + len(block.near.indices))
        assert_exact(block.near, (ids[place], values[place]))
        at = place.stop
    assert at == rows.stop
    assert_exact(top_k(bank[rows.start:rows.stop], bank, 6, self_offset=rows.start, memory=memory),
                 (ids[rows.start:rows.stop], values[rows.start:rows.stop]))


def test_near_and_far_from_one_product(memory):
    bank = whole_numbers(150)
    blocks = list(search(None, bank, 4, far=True, memory=memory))
    near = [torch.cat([block.near[i] for block in blocks]) for i in range(2)]
    far = [torch.cat([block.far[i] for block in blocks]) for i in range(2)]
    assert_exact(near, full_sort(bank, bank, 4, 0))
    assert_exact(far, full_sort(bank, bank, 4, 0, largest=False))
    only = list(search(None, bank, 4, near=False, far=True))
    assert all(block.near is None for block in only)
    assert all(block.far is None for block in search(None, bank, 4))


@pytest.mark.parametrize("metric", ["inner", "cosine", "l2"])
@pytest.mark.parametrize("products", ["float32", "tf32", "bf16"])
def test_floats_are_a_full_sort_up_to_rounding(metric, products, memory):
    bank = torch.randn(200, 32, generator=torch.Generator().manual_seed(3)) * 3
    values, ids = top_k(bank, bank, 12, self_offset=0, metric=metric, products=products, memory=memory)
    expected, scores = full_sort(bank, bank, 12, 0, metric=metric)
    np.testing.assert_allclose(values.numpy(), scores, rtol=2e-6, atol=3e-6 * (1 if metric == "cosine" else 300))
    assert (ids.numpy() == expected).mean() > 0.999  # neighbouring ranks closer than float32 may change places
    assert all(len(set(row)) == 12 and i not in row for i, row in enumerate(ids.tolist()))


def test_cosine_says_nothing_of_lengths_and_zero_rows_are_at_right_angles_to_all():
    bank = torch.tensor([[2.0, 0], [0, 0], [9, 0], [0, 5], [0, 0], [-1, 0]])
    values, ids = top_k(bank, bank, 5, self_offset=0, metric="cosine")
    assert ids[0].tolist() == [2, 1, 3, 4, 5]
    assert values[0].tolist() == [1, 0, 0, 0, -1]
    assert ids[1].tolist() == [0, 2, 3, 4, 5]
    assert values[1].tolist() == [0] * 5


# ---- the first threshold, and the proof that it was low enough


def sampled(monkeypatch, change=lambda rank: rank):
    """Count the searches that had a sample and the rows searched again; ``change`` the sample's rank."""
    seen = {"samples": 0, "again": 0}
    draw, again = exact._Search._sample, exact._Search._search_again

    def spy_draw(self, room):
        rows, rank = draw(self, room)
        seen["samples"] += rows is not None
        return rows, change(rank)

    def spy_again(self, numbers, *rest):
        seen["again"] += len(numbers)
        return again(self, numbers, *rest)

    monkeypatch.setattr(exact._Search, "_sample", spy_draw)
    monkeypatch.setattr(exact._Search, "_search_again", spy_again)
    return seen


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("far", [False, True])
def test_a_threshold_from_a_sample(far, monkeypatch):
    seen = sampled(monkeypatch)
    bank = unit(2000, 12)
    values, ids = top_k(bank, bank, 20, self_offset=0, largest=not far)
    assert seen["samples"] == 1
    assert seen["again"] < 20
    expected, scores = full_sort(bank, bank, 20, 0, not far)
    np.testing.assert_allclose(values.numpy(), scores, atol=1e-6)
    assert (ids.numpy() == expected).mean() > 0.999


@pytest.mark.parametrize("queries", [None, 300])
def test_a_threshold_that_was_too_high_costs_time_only(queries, monkeypatch):
    seen = sampled(monkeypatch, lambda rank: 1)
    bank = whole_numbers(2000, d=40, most=9)
    others = None if queries is None else whole_numbers(queries, d=40, most=9, seed=8)
    found = top_k(bank if others is None else others, bank, 20, self_offset=0 if others is None else None)
    assert seen["again"] > 100
    assert_exact(found, full_sort(bank if others is None else others, bank, 20, 0 if others is None else None))


@pytest.mark.parametrize("products", ["tf32", "bf16"])
def test_rounded_products_that_prove_nothing_are_made_again(products, monkeypatch):
    """Rows that differ by less than the rounding: without the bound the list would be any of them."""
    seen = sampled(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    bank = torch.ones(600, 16) + 1e-4 * torch.randint(-8, 9, (600, 16), generator=generator)
    queries = torch.randint(-3, 4, (20, 16), generator=generator).float()
    values, ids = top_k(queries, bank, 10, products=products)
    assert seen["again"] > 0
    _, scores = full_sort(queries, bank, 10)
    np.testing.assert_allclose(values.numpy(), scores, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(scores64(queries, bank, "inner"), ids.numpy(), 1), scores, atol=1e-5)


@pytest.mark.parametrize("products", ["tf32", "bf16"])
def test_rounded_products_that_prove_enough_are_not_made_again(products, monkeypatch):
    """Neighbours far enough apart: the wider list nearly always proves itself."""
    seen = sampled(monkeypatch)
    bank = torch.randn(900, 8, generator=torch.Generator().manual_seed(1))
    top_k(bank, bank, 10, self_offset=0, products=products, metric="cosine")
    assert seen["again"] < 90


# ---- keys


def test_keys_are_in_the_order_of_scores_and_then_of_indices():
    scores = torch.tensor([-torch.inf, -3e38, -1.5, -1e-40, -0.0, 0.0, 1e-40, 1.5, 3e38, torch.inf])
    keys = encode(scores, torch.arange(10))
    assert keys.argsort().tolist() == [0, 1, 2, 3, 5, 4, 6, 7, 8, 9]
    values, ids = decode(keys)
    assert torch.equal(values, scores)
    assert ids.tolist() == list(range(10))
    assert decode(encode(torch.ones(1), torch.tensor([2**32 - 1])))[1].item() == 2**32 - 1


def test_room_for_candidates_is_more_than_what_is_kept():
    assert all(capacity(keep) > keep for keep in (1, 384, 100_000))


# ---- what the features may be


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_memory_mapped_file_of_half_precision(dtype, tmp_path, memory):
    bank = whole_numbers(130).to(dtype)
    bank.view(torch.int16).numpy().tofile(tmp_path / "bank")
    mapped = torch.from_numpy(np.memmap(tmp_path / "bank", np.int16, "c", shape=(130, 5))).view(dtype)
    assert_exact(top_k(mapped, mapped, 6, self_offset=0, memory=memory), full_sort(bank, bank, 6, 0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("metric", ["inner", "cosine"])
def test_a_row_that_is_not_finite_is_named(value, metric):
    bank = unit(50, 4)
    bank[17, 2] = bank[30, 0] = value
    with pytest.raises(UserError, match="row 17 "):
        top_k(bank, bank, 3, self_offset=0, metric=metric)
    with pytest.raises(UserError, match="row 17 "):
        top_k(bank, unit(50, 4), 3, metric=metric)


@pytest.mark.parametrize(("k", "offset"), [(0, None), (-1, None), (11, None), (10, 0), (0, 0)])
def test_impossible_k(k, offset):
    bank = unit(10, 4)
    with pytest.raises(ValueError, match="rows to choose from"):
        top_k(bank, bank, k, self_offset=offset)


def test_widths_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit"):
        top_k(unit(3, 5), unit(10, 4), 2)


def test_inputs_stay():
    queries, bank = unit(5, 4, 1), unit(10, 4)
    before = queries.clone(), bank.clone()
    top_k(queries, bank, 9, metric="cosine")
    top_k(bank, bank, 9, self_offset=0)
    assert torch.equal(queries, before[0])
    assert torch.equal(bank, before[1])


def test_the_precision_of_others_products_stays():
    before = torch.get_float32_matmul_precision()
    top_k(unit(5, 4), unit(10, 4), 3, products="tf32")
    assert torch.get_float32_matmul_precision() == before
