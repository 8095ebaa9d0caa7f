"""What the losses declare of themselves: the tables of docs/METHODS.md and the recipes of scripts/methods.sh."""

from pathlib import Path

import pytest
import torch

from losses import LOSSES, build_loss, settings, tables
from losses.base import Loss
from runtime.errors import UserError

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "METHODS.md"
LINES = [line.strip("|").split("|") for line in tables.method_table().splitlines()]
ROWS = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in LINES if cells[0].strip() in LOSSES}


def test_the_docs_hold_the_losses_own_tables():
    held = f"{tables.BEGIN}{tables.method_table()}\n{tables.recipe_table()}{tables.END}"
    assert held in DOCUMENT.read_text(), "run: python -m losses.tables docs/METHODS.md"


def test_writing_the_tables_leaves_the_rest_alone(tmp_path):
    path = tmp_path / "METHODS.md"
    path.write_text(f"before\n{tables.BEGIN}old\n{tables.END}after\n")
    tables.main([str(path)])
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{tables.END}after\n")
    assert tables.method_table() in text
    assert "old" not in text


def test_every_loss_has_a_row():
    assert list(ROWS) == list(LOSSES)


def test_a_row_in_full():
    assert ROWS["disco"] == ["2", "head", "wide", "momentum student, queue", "2",
                             "`--queue-size 65536` `--s-temp 0.2` `--disco-weight 32` `--disco-sum`"]


@pytest.mark.parametrize("name", LOSSES)
def test_a_queue_is_named(name):
    assert ("queue" in LOSSES[name].needs.also) == ("queue_size" in settings([name]))


@pytest.mark.parametrize("name", LOSSES)
def test_passes_are_the_images_that_the_student_is_given(name):
    views = [torch.zeros(6, 3, 8, 8, dtype=torch.uint8)] * LOSSES[name].needs.views
    inputs = build_loss(name, dim=4, student_dim=4, queue_size=4).inputs(views, views)
    assert sum(map(len, inputs.student)) == 6 * LOSSES[name].needs.passes


def test_a_recipe_names_the_files_that_it_needs():
    found = {name: tables.recipe_lines(name, "resnet18")[0] for name in ("coss", "seed", "moco")}
    assert found == {"coss": "4 teacher neighbours", "seed": "8 teacher", "moco": "8"}


@pytest.mark.parametrize("words", [("sed", "resnet18"), ("seed", "resnet19")])
def test_wrong_words(words):
    with pytest.raises(UserError, match=words[0] if words[0] == "sed" else words[1]):
        tables.recipe_flags(*words)


def test_a_setting_declared_twice_is_a_mistake_of_ours(monkeypatch):
    from typing import Annotated

    from runtime.settings import Setting

    class Again(Loss):
        def __init__(self, s_temp: Annotated[float, Setting("another text")] = 1.0) -> None:
            super().__init__()

    Again.__init__.__annotations__["s_temp"] = Annotated[float, Setting("another text")]
    monkeypatch.setitem(LOSSES, "again", Again)
    with pytest.raises(TypeError, match="again declare s_temp apart"):
        settings()
