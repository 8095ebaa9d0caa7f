"""The table of docs/METHODS.md says what the losses say of themselves."""

import inspect
from pathlib import Path

import pytest
import torch

from losses import LOSSES, build_loss

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "METHODS.md"
LINES = [line.strip("|").split("|") for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
ROWS = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in LINES if cells[0].strip() in LOSSES}
IN_LOOP = {"moco_dim", "moco_m", "teacher_bn"}  # flags of the loop, not of the loss


def test_every_loss_has_a_row():
    assert list(ROWS) == list(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_rows_agree_with_the_code(name):
    needs, (views, teacher, head, also, passes, flags) = LOSSES[name].needs, ROWS[name]
    assert (int(views), teacher, head) == (needs.views, needs.teacher or "-", needs.head)
    assert float(passes) == needs.passes
    assert ("momentum student" in also) == needs.momentum
    assert ("pairs" in also) == needs.bag
    arguments = set(inspect.signature(LOSSES[name]).parameters) - {"dim", "student_dim", "args", "kwargs"}
    assert ("queue" in also) == ("queue_size" in arguments)
    assert {flag.strip("`-").replace("-", "_") for flag in flags.split()} - IN_LOOP == arguments


@pytest.mark.parametrize("name", LOSSES)
def test_passes_are_the_images_that_the_student_is_given(name):
    views = [torch.zeros(6, 3, 8, 8, dtype=torch.uint8)] * LOSSES[name].needs.views
    inputs = build_loss(name, dim=4, student_dim=4, queue_size=4).inputs(views)
    assert sum(map(len, inputs.student)) == 6 * LOSSES[name].needs.passes
