"""The losses with queues on two processes are those of one with the whole batch: value, gradient and queue."""

import pytest
import torch
from helpers.ranks import on_ranks

from losses import build_loss

OUTPUTS = {  # how many of each the loss is given
    "seed": {"student": 1, "teacher": 1}, "compress": {"student": 1, "teacher": 1, "momentum": 1},
    "moco": {"student": 1, "momentum": 1}, "disco": {"student": 2, "teacher": 2, "momentum": 1},
    "bingo": {"student": 3, "teacher": 2},
}


def three_steps(rank, world):
    """{loss: (values, this rank's gradients, the queue)} for the rank's part of the same eight rows a step."""
    found = {}
    for name, counts in OUTPUTS.items():
        torch.manual_seed(0)
        loss = build_loss(name, dim=4, student_dim=4, queue_size=11).double()
        values, gradients = [], []
        for _ in range(3):
            outputs = {role: torch.randn(count, 8, 4, dtype=torch.float64).chunk(world, 1)[rank].requires_grad_(
                role == "student") for role, count in counts.items()}
            given = {role: x[0] if len(x) == 1 else tuple(x) for role, x in outputs.items()}
            parts = loss(**given, **({"share": 0.3} if name == "bingo" else {}))
            parts["loss"].backward()
            values.append(parts["loss"].item())
            gradients.append(outputs["student"].grad.tolist())
        found[name] = values, gradients, {k: v.tolist() for k, v in loss.state_dict().items()}
    return found


def test_two_processes_are_one(tmp_path):
    whole = three_steps(0, 1)
    parts = on_ranks(2, three_steps, tmp_path, 2)
    for name, (values, gradients, state) in whole.items():
        for step in range(3):
            assert sum(part[name][0][step] for part in parts) / 2 == pytest.approx(values[step], rel=1e-10), name
            shared = torch.cat([torch.tensor(part[name][1][step]) for part in parts], 1) / 2  # as DDP averages
            torch.testing.assert_close(shared, torch.tensor(gradients[step]), rtol=1e-8, atol=1e-10)
        for part in parts:
            assert part[name][2].keys() == state.keys()
            for key, value in state.items():
                torch.testing.assert_close(torch.tensor(part[name][2][key]), torch.tensor(value), rtol=0, atol=1e-12)
