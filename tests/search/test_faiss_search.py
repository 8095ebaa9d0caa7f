"""faiss and our search find the same rows; without faiss one sentence says what to install."""

import sys

import pytest
import torch

from runtime.errors import UserError
from search.exact import search
from search.faiss_search import search_faiss


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        search_faiss()


@pytest.mark.parametrize("metric", ["inner", "cosine", "l2"])
@pytest.mark.parametrize("others", [None, 40])
def test_the_same_rows(metric, others):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(300, 12, generator=generator)
    queries = None if others is None else torch.randn(others, 12, generator=generator)
    rows = range(5, 33)
    ours = list(search(queries, bank, 7, rows=rows, far=True, metric=metric))
    theirs = list(search_faiss()(queries, bank, 7, rows=rows, far=True, metric=metric, device="cpu", memory=None))
    for direction in ("near", "far"):
        a, b = ([torch.cat(column) for column in zip(*(getattr(block, direction) for block in blocks), strict=True)]
                for blocks in (ours, theirs))
        torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(a[1], b[1])
    with pytest.raises(ValueError, match="rows to choose from"):
        list(search_faiss()(queries, bank, 301))


def test_a_row_that_its_copies_push_out_of_its_own_list():
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    block, = search_faiss()(None, torch.ones(30, 4), 3)
    assert block.near.indices.shape == (30, 3)
    assert not (block.near.indices == torch.arange(30)[:, None]).any()
