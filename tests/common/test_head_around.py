"""common/distillation.py: --head-init teacher on the networks of a run."""

import pytest
import torch
from torch import nn

from common.distillation import chosen_start, head_around
from data.batches import Batch
from losses import build_objective
from models.distiller import Distiller
from models.heads import build_heads

WIDTH, TARGETS = 6, {"features": 5, "head": 3}


class Teacher(nn.Module):
    """Each target is a fixed map of the pixels."""

    def __init__(self):
        super().__init__()
        self.maps = nn.ModuleDict({kind: nn.Linear(12, width) for kind, width in TARGETS.items()})

    @torch.no_grad()
    def targets(self, images, kinds):
        return tuple(9 + 4 * self.maps[kind](images.flatten(1).float() / 255) for kind in kinds)


def parts(names, batch_norm=False):
    """Student, teacher, objective and batches of 64 images of 2 x 2 pixels."""
    torch.manual_seed(0)
    loss = build_objective(names, None, 1.0, {None: 4, **TARGETS}, student_dim=WIDTH, queue_size=8)
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(12, WIDTH), nn.BatchNorm1d(WIDTH))
    student = Distiller(trunk, build_heads(loss.needs.heads, WIDTH, {None: 4, **TARGETS}, batch_norm))
    images = torch.randint(0, 256, (2, 64, 3, 2, 2), dtype=torch.uint8)
    return student, Teacher(), loss, [Batch((x,) * loss.needs.views, torch.arange(64), []) for x in images]


@pytest.mark.parametrize("names", ["coss", "seed", "coss+seed"])
def test_each_head_starts_around_what_it_is_compared_with(names):
    student, teacher, loss, batches = parts(names)
    buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
    assert head_around(student, teacher, loss, batches, lambda batch: None) == 128
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in student.named_buffers())
    with torch.no_grad():
        outputs = [torch.cat(x).double() for x in zip(*(student(batch.views[0]) for batch in batches), strict=True)]
        for output, (_, to) in zip(outputs, loss.needs.heads, strict=True):
            target = torch.cat([teacher.targets(batch.views[0], [to])[0] for batch in batches]).double()
            assert torch.allclose(output.mean(0), target.mean(0), rtol=1e-4)
            spreads = [(x - x.mean(0)).square().sum(1).mean().sqrt() for x in (output, target)]
            assert torch.allclose(*spreads, rtol=1e-4)


@pytest.mark.parametrize(("names", "batch_norm"), [("compress", False), ("coss", True)])
def test_a_head_that_ends_otherwise_stays(names, batch_norm):
    student, teacher, loss, batches = parts(names, batch_norm)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    assert head_around(student, teacher, loss, batches, lambda batch: None) == 0
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize(("names", "start"), [("coss", "teacher"), ("cosine", "teacher"), ("coss+seed", "teacher"),
                                              ("coss_centred", "random"), ("seed", "random"), ("mse", "random")])
def test_the_default_is_the_teachers_where_directions_of_rows_are_compared(names, start):
    loss = parts(names)[2]
    assert chosen_start("auto", loss) == start
    assert [chosen_start(given, loss) for given in ("random", "teacher")] == ["random", "teacher"]
