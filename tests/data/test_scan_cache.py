"""Kept scans: equal to a new one, not used once any folder has changed, and never in the way."""

import os

import pytest
from PIL import Image

from data import datasets, scan_cache
from data.datasets import open_source


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.delenv("COSS_SCAN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(scan_cache, "MIN_IMAGES", 1)
    monkeypatch.setattr(scan_cache, "SETTLED_SECONDS", -60.0)
    for name in ("b/2.png", "b/10.png", "a/deep/é.png", "empty/notes.txt", "a/1.png"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "tree" / name, "PNG")
    return tmp_path / "tree"


@pytest.fixture
def scans(monkeypatch):
    """How often a folder was really scanned."""
    counted = []

    def scan(*args):
        counted.append(args)
        return original(*args)

    original = datasets.scan
    monkeypatch.setattr(datasets, "scan", scan)
    return counted


def same(a, b):
    def told(source):
        labels = None if source.labels is None else source.labels.tolist()
        return list(source.names), labels, source.classes, source.title, source.fingerprint()

    return told(a) == told(b)


def test_the_second_start_scans_nothing_and_finds_the_same(tree, scans, tmp_path):
    first, second = open_source(str(tree)), open_source(str(tree))
    assert len(scans) == 1
    assert same(first, second)
    assert second.open(0).size == (2, 2)
    assert len(list((tmp_path / "home" / "coss" / "scans").iterdir())) == 1
    open_source(str(tree / "a"))  # another folder
    assert len(scans) == 2


def test_flat_folders_are_kept_too(tree, scans):
    (tree / "0.png").write_bytes((tree / "a" / "1.png").read_bytes())
    first, second = open_source(str(tree)), open_source(str(tree))
    assert len(scans) == 1
    assert second.labels is None
    assert same(first, second)


CHANGES = {
    "a file": lambda tree: (tree / "a" / "deep" / "new.png").write_bytes(b""),
    "a file less": lambda tree: (tree / "b" / "2.png").unlink(),
    "a name": lambda tree: (tree / "b" / "2.png").rename(tree / "b" / "3.png"),
    "a class": lambda tree: (tree / "new").mkdir(),
    "a class less": lambda tree: [(tree / "empty" / "notes.txt").unlink(), (tree / "empty").rmdir()],
    "a file in a class without images": lambda tree: (tree / "empty" / "x.png").write_bytes(b""),
    "a class's name": lambda tree: (tree / "b").rename(tree / "bb"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(tree, scans, change):
    for root, _, _ in os.walk(tree):
        os.utime(root, (1, 1))  # long ago, so that a coarse clock cannot hide the change
    open_source(str(tree))
    CHANGES[change](tree)
    source = open_source(str(tree))
    assert len(scans) == 2
    assert same(source, open_source(str(tree)))
    assert len(scans) == 2


def test_a_change_whose_time_is_set_back_is_noticed(tree, scans):
    os.utime(tree / "b", (1, 1))
    open_source(str(tree))
    (tree / "b" / "2.png").rename(tree / "b" / "3.png")
    os.utime(tree / "b", (1, 1))
    assert "b/3.png" in list(open_source(str(tree)).names)


def test_a_folder_that_changed_just_now_is_not_kept(tree, scans, monkeypatch):
    monkeypatch.setattr(scan_cache, "SETTLED_SECONDS", 3600.0)
    open_source(str(tree))
    open_source(str(tree))
    assert len(scans) == 2


@pytest.mark.parametrize("value", ["off", "0", "OFF"])
def test_it_can_be_switched_off(tree, scans, monkeypatch, tmp_path, value):
    monkeypatch.setenv("COSS_SCAN_CACHE", value)
    open_source(str(tree))
    open_source(str(tree))
    assert len(scans) == 2
    assert not (tmp_path / "home").exists()


def test_another_place(tree, scans, monkeypatch, tmp_path):
    monkeypatch.setenv("COSS_SCAN_CACHE", str(tmp_path / "elsewhere"))
    open_source(str(tree))
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1
    assert not (tmp_path / "home").exists()


def test_small_folders_are_not_kept(tree, scans, monkeypatch, tmp_path):
    monkeypatch.setattr(scan_cache, "MIN_IMAGES", 5)
    open_source(str(tree))
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("damage", [b"", b"PK\3\4 no", None])
def test_a_damaged_cache_is_scanned_anew(tree, scans, tmp_path, damage):
    expected = open_source(str(tree))
    (file,) = (tmp_path / "home" / "coss" / "scans").iterdir()
    file.write_bytes(file.read_bytes()[:-200] if damage is None else damage)
    assert same(open_source(str(tree)), expected)
    assert len(scans) == 2
    assert same(open_source(str(tree)), expected)
    assert len(scans) == 2


def test_a_place_that_cannot_be_written_is_no_matter(tree, scans, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COSS_SCAN_CACHE", str(tmp_path / "file" / "below"))
    assert same(open_source(str(tree)), open_source(str(tree)))
