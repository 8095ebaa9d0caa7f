"""Statistics over a batch that processes share, beside the same of the whole batch by one; real processes."""

import pytest
import torch
from helpers.ranks import on_ranks

from runtime.collectives import BatchStatistics, sum_over_ranks

SPLITS = [(4, 3), (1, 6), (3, 1, 2, 5)]


def batch(rows):
    return torch.randn(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))


def statistics(scope, x):
    found = BatchStatistics(scope)
    top = found.max(x)
    total, outer = found.sums(x, x[:, :, None] * x[:, None])
    mean, = found.means(x.square())
    return top, total, outer, mean


def value(scope, x):
    """A scalar that depends on all of them in a way that is not linear."""
    top, total, outer, mean = statistics(scope, x)
    return (total.sin() * mean).sum() + outer.logsumexp((0, 1)) + (top * total).sum()


def globally(rank, split):
    mine = batch(sum(split)).split(split)[rank].clone().requires_grad_()
    result = value("global", mine)
    result.backward()
    return [x.detach().numpy() for x in (*statistics("global", mine), result, mine.grad)]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_rank_has_what_one_process_with_the_whole_batch_has(split, tmp_path):
    whole = batch(sum(split)).requires_grad_()
    expected = value("global", whole)  # without processes the batch is the whole one
    expected.backward()
    shares = on_ranks(len(split), globally, tmp_path, split)
    for share, gradient in zip(shares, whole.grad.split(split), strict=True):
        *found, result, mine = map(torch.from_numpy, share)
        for a, b in zip(found, statistics("local", whole), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(result, expected.detach(), rtol=1e-13, atol=0)
        # what is differentiated is the sum of the ranks' losses, of which averaging makes the loss again
        torch.testing.assert_close(mine / len(split), gradient, rtol=1e-12, atol=1e-12)


def own(rank, split):
    x = torch.full((2,), float(rank + 1), requires_grad=True)
    (sum_over_ranks(x) * torch.tensor([1.0, 10.0]) * (rank + 1)).sum().backward()  # another loss on each rank
    mine = batch(sum(split)).split(split)[rank]
    return x.grad.tolist(), [y.numpy() for y in statistics("local", mine)]


def test_the_gradient_is_of_the_sum_of_the_ranks_losses_and_local_stays_at_home(tmp_path):
    split = (4, 3)
    for rank, (gradient, found) in enumerate(on_ranks(2, own, tmp_path, split)):
        assert gradient == [3.0, 30.0]  # (1 + 2) times the weights, on both
        for a, b in zip(found, statistics("global", batch(7).split(split)[rank]), strict=True):
            torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-13, atol=1e-13)


def test_alone_nothing_is_sent_and_statistics_are_the_formulas():
    x = batch(5)
    top, total, outer, mean = statistics("global", x)
    assert torch.equal(top, x.max(0).values)
    torch.testing.assert_close(total, sum(x))
    torch.testing.assert_close(outer, x.T @ x)
    torch.testing.assert_close(mean, x.square().mean(0))
    assert sum_over_ranks(x) is x


def test_unknown_scope():
    with pytest.raises(ValueError, match="'all' is none of local, global"):
        BatchStatistics("all")
