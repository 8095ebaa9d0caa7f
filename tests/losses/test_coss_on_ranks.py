"""CoSS over the batch of all processes: loss and parameter gradients are those of one process with the whole batch."""

import pytest
import torch
from helpers.ranks import on_ranks
from torch import nn

from losses.coss import CentredCoSS, CoSS
from runtime.device import Process, wrap


def problem(rows):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(rows, 6, dtype=torch.float64, generator=generator)
    teacher = torch.randn(rows, 5, dtype=torch.float64, generator=generator)
    torch.manual_seed(2)
    student = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    return student, images, teacher


def one_step(space_batch, split, rank, process, kind=CoSS):
    """The loss's parts and the parameter gradients behind DistributedDataParallel."""
    student, images, teacher = problem(sum(split))
    model, loss = wrap(student, process), kind(0.7, 1.3, space_batch=space_batch)
    parts = loss(student=model(images.split(split)[rank]), teacher=teacher.split(split)[rank])
    parts["loss"].backward()
    return {k: v.item() for k, v in parts.items()}, [p.grad.numpy() for p in student.parameters()]


def on_rank(rank, space_batch, cases):
    return [one_step(space_batch, split, rank, Process(rank, len(split), torch.device("cpu")), kind)
            for split, kind in cases]


def alone(space_batch, rows, kind=CoSS):
    return one_step(space_batch, (rows,), 0, Process(0, 1, torch.device("cpu")), kind)


@pytest.mark.parametrize("cases", [[((4, 4), CoSS), ((5, 2), CoSS), ((5, 2), CentredCoSS)],
                                   [((3, 3, 3, 3), CoSS), ((3, 1, 2, 5), CoSS), ((3, 1, 2, 5), CentredCoSS)]],
                         ids=["2 processes", "4 processes"])
def test_global_is_the_whole_batch_for_any_number_of_processes(cases, tmp_path):
    of_ranks = on_ranks(len(cases[0][0]), on_rank, tmp_path, "global", cases)
    for i, (split, kind) in enumerate(cases):
        parts, gradients = alone("local", sum(split), kind)
        for found, mine in (of_cases[i] for of_cases in of_ranks):
            assert found == pytest.approx(parts, rel=1e-12), split  # on every rank, not only on average
            for a, b in zip(mine, gradients, strict=True):
                torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b), rtol=1e-10, atol=1e-10)


def test_local_is_another_loss_on_two_processes(tmp_path):
    parts, gradients = alone("local", 8)
    ((first, mine),), ((second, _),) = on_ranks(2, on_rank, tmp_path, "local", [((4, 4), CoSS)])
    assert (first["row"] + second["row"]) / 2 == pytest.approx(parts["row"], rel=1e-12)  # rows do not meet others
    assert abs((first["space"] + second["space"]) / 2 - parts["space"]) > 1
    assert abs(mine[0] - gradients[0]).max() > 1e-2


def test_global_alone_is_local():
    assert alone("global", 7)[0] == alone("local", 7)[0]
