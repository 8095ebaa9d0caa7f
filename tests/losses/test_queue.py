"""The queue beside a list that is overwritten one entry at a time: around its end, in two processes, saved."""

import io

import pytest
import torch
from helpers.naive import Ring
from helpers.ranks import on_ranks

from losses.queue import Queue, info_nce


def rows(count, dim=3, seed=0):
    return torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("counts", [[1] * 9, [3] * 6, [4, 4, 4], [7, 7], [2, 5, 1, 6, 3], [20, 1, 15]])
def test_is_a_ring_also_where_nothing_divides(size, counts):
    queue = Queue(size, 3).double()
    ring = Ring(queue.items.tolist())
    for step, count in enumerate(counts):
        keys = rows(count, seed=step)
        queue.put(keys)
        ring.put(keys.tolist())
        assert queue.items.tolist() == ring.rows
        assert queue.filled().tolist() == [i < ring.puts for i in range(size)]


def test_begins_with_random_directions_and_nothing_filled():
    queue = Queue(50, 8)
    torch.testing.assert_close(queue.items.norm(dim=1), torch.ones(50))
    assert not queue.filled().any()
    assert not torch.equal(queue.items, Queue(50, 8).items)


def test_a_later_put_leaves_the_gradient_alone():
    queue, z = Queue(5, 3).double(), rows(2).requires_grad_()
    items = queue.items.clone()
    products = queue.similarities(z)
    queue.put(rows(4, seed=1))
    products.sum().backward()
    torch.testing.assert_close(z.grad, items.sum(0).expand(2, 3))
    assert queue.items.grad_fn is None


def test_half_precision_rows_are_kept_in_float32():
    queue = Queue(5, 3)
    queue.put(rows(2).half())
    assert queue.items.dtype == torch.float32
    assert torch.equal(queue.items[:2], rows(2).half().float())


def test_a_row_that_is_not_finite_is_left_out():
    queue, keys = Queue(5, 3).double(), rows(3)
    before = queue.items.clone()
    keys[1, 2], keys[2, 0] = torch.inf, torch.nan
    queue.put(keys)
    assert torch.equal(queue.items, torch.cat([keys[:1], before[1:]]))
    assert int(queue.count) == 3


def test_goes_on_from_a_file_bit_for_bit():
    queue = Queue(5, 3)
    queue.put(rows(7).float())
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    again = Queue(5, 3)
    again.load_state_dict(torch.load(file, weights_only=True))
    for step in range(4):
        assert torch.equal(again.items, queue.items)
        assert torch.equal(again.filled(), queue.filled())
        for x in (queue, again):
            x.put(rows(2, seed=step).float())


def test_the_published_size_takes_33_6_megabytes():
    assert 65536 * 128 * Queue(4, 128).items.element_size() == 33_554_432
    assert sum(x.numel() for x in Queue(65, 128).state_dict().values()) == 65 * 128 + 1


def put_in_turn(rank, world):
    """Three steps of ten rows over all processes into a queue of eight."""
    queue = Queue(8, 3).double()
    for step in range(3):
        queue.put(rows(10, seed=step).chunk(world)[rank])
    return queue.items.tolist(), int(queue.count)


def test_two_processes_hold_what_one_has(tmp_path):
    torch.manual_seed(0)
    one, count = put_in_turn(0, 1)
    for items, put in on_ranks(2, put_in_turn, tmp_path, 2):
        assert items == one
        assert put == count == 30


def test_accuracy_is_the_share_of_positives_before_every_negative():
    z = torch.eye(3, dtype=torch.float64)
    negatives = torch.tensor([[0.5, 0.2], [0.5, 1.5], [0.0, 0.0]], dtype=torch.float64)
    assert info_nce(z, z, negatives, 0.2)[1].item() == pytest.approx(2 / 3)
