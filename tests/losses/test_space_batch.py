"""Column terms over the batch of all processes: two real processes with uneven batches beside one with all rows."""

import pytest
import torch
from helpers.ranks import on_ranks

from losses.dino import DINOSS
from losses.dist import DIST
from runtime.device import all_reduce_mean

LOSSES = {"dinoss": DINOSS, "dist": DIST}
SPLIT = (5, 3)


def with_gradient(name, rows, scope):
    """The loss of some of 8 rows, and its gradient with respect to weights of the student."""
    teacher, student = torch.randn(2, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    weight = torch.eye(6, dtype=torch.float64).requires_grad_()
    loss = LOSSES[name](s_temp=0.7, t_temp=0.4, space_batch=scope)
    parts = loss(student=student[rows] @ weight, teacher=teacher[rows])
    return [*(parts[key].detach() for key in ("loss", "row", "space")), torch.autograd.grad(parts["loss"], weight)[0]]


def on_a_rank(rank, scope):
    """As DistributedDataParallel averages; the values as they are."""
    rows = slice(rank * SPLIT[0], rank * SPLIT[0] + SPLIT[rank])
    found = {}
    for name in LOSSES:
        *values, gradient = with_gradient(name, rows, scope)
        found[name] = [x.numpy() for x in (*values, all_reduce_mean(gradient))]
    return found


@pytest.mark.parametrize("scope", ["global", "local"])
def test_two_processes_beside_one(scope, tmp_path):
    for rank, found in enumerate(on_ranks(2, on_a_rank, tmp_path, scope)):
        for name, values in found.items():
            whole = with_gradient(name, slice(None), "local")
            if scope == "global":
                expected = whole
            else:
                halves = [with_gradient(name, rows, "local") for rows in (slice(5), slice(5, None))]
                expected = [*halves[rank][:3], (halves[0][3] + halves[1][3]) / 2]
                assert abs(float(values[2]) - whole[2].item()) > 1e-3
            for x, y in zip(values, expected, strict=True):
                torch.testing.assert_close(torch.as_tensor(x), y, rtol=1e-10, atol=1e-13)
