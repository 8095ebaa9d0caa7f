"""The documents name what is there: every module in the tree, and every file that a document links or mentions."""

import fnmatch
import importlib
import re
from html import escape
from pathlib import Path

import pytest

from losses import LOSSES

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
TREE = dict(re.findall(r"^- \*\*([\w/]+)/\*\*, (.*?)(?=^- |\Z)", ARCHITECTURE.split("\n\n`scripts/`")[0], re.M | re.S))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_tree_names_every_package():
    assert set(TREE) == {str(path.parent.relative_to(ROOT)) for path in [*ROOT.glob("*/__init__.py"),
                                                                       *ROOT.glob("evals/*/__init__.py")]}
    scripts = re.findall(r"^\| `(\w+)\.py` \|", ARCHITECTURE, re.M)
    assert sorted(scripts) == sorted(path.stem for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("package", TREE)
def test_the_tree_names_every_module(package):
    there = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    there -= {loss.__module__.removeprefix("losses.") for loss in LOSSES.values()}  # listed in docs/METHODS.md
    named = [fnmatch.filter(there, name) for name in re.findall(r"`([\w*]+)`", TREE[package])]
    assert all(named) and sorted(sum(named, [])) == sorted(there), (
        f"the tree in docs/ARCHITECTURE.md names each module of {package}/ once: {sorted(there)}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_a_heading(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        headings = [re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-")
                    for line in re.findall(r"^#+ (.*)$", file.read_text(), re.M)] if heading else []
        assert not heading or heading in headings, target


def test_architecture_names_functions_that_are_there():
    for name, function in re.findall(r"`([\w/]+\.py): ([\w.]+)`", ARCHITECTURE):
        text = (ROOT / name).read_text()
        assert all(re.search(rf"(def|class) {part}\b", text) for part in function.split(".")), f"{name}: {function}"


def test_tables_and_pictures_show_the_records(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "figures"))
    drawn = importlib.import_module("draw_results")
    text = drawn.PAGE.read_text()
    assert text.count("<!-- table ") == len(drawn.TABLES)
    assert drawn.filled(text) == text, "run python docs/figures/draw_results.py"
    for picture, table in drawn.PICTURES.items():
        words = (ROOT / "docs/figures" / f"{picture.__name__}.svg").read_text()
        assert escape(drawn.TABLES[table](), quote=False) in words, "run python docs/figures/draw_results.py"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
