"""What --data means: splits, lists, named sets, and each refusal."""

import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torchvision
from helpers.trees import refusal, write

from data.datasets import datasets_root, open_source

pytestmark = pytest.mark.usefixtures("root")

# ---- splits


@pytest.mark.parametrize("other", ["val", "test", "valid", "validation"])
@pytest.mark.parametrize("extra", [[], ["annotations/0.xml"]])
def test_splits(tmp_path, other, extra):
    folder = write(tmp_path / "x", "train/a/0.png", "train/b/1.png", f"{other}/a/7.png", *extra)
    assert list(open_source(str(folder)).names) == ["a/0.png", "b/1.png"]
    assert list(open_source(str(folder), split="test").names) == ["a/7.png"]


def test_val_comes_before_test_and_test_before_valid(tmp_path):
    folder = write(tmp_path / "x", "train/a/0.png", "valid/a/1.png", "test/a/2.png", "val/a/3.png")
    for gone, expected in [(None, "a/3.png"), ("val/a/3.png", "a/2.png"), ("test/a/2.png", "a/1.png")]:
        if gone:
            (folder / gone).unlink()
            (folder / gone).parent.rmdir()
            (folder / gone).parent.parent.rmdir()
        assert list(open_source(str(folder), split="test").names) == [expected]


def test_only_train(tmp_path):
    folder = write(tmp_path / "x", "train/a/0.png")
    assert open_source(str(folder)).classes == ["a"]
    text = refusal(str(folder), split="test")
    assert str(folder) in text
    assert "val/" in text


def test_no_train(tmp_path):
    folder = write(tmp_path / "x", "val/a/0.png", "test/a/1.png")
    assert "no train/" in refusal(str(folder))


def test_a_class_called_train_is_a_class(tmp_path):
    folder = write(tmp_path / "x", "boat/0.png", "train/1.png", "plane/2.png")
    assert open_source(str(folder)).classes == ["boat", "plane", "train"]
    folder = write(tmp_path / "y", "boat/0.png", "train/1.png", "test/2.png")
    assert open_source(str(folder)).classes == ["boat", "test", "train"]


def test_a_split_folder_itself_serves_either_split(tmp_path):
    folder = write(tmp_path / "x", "train/a/0.png", "val/a/1.png")
    assert list(open_source(str(folder / "val"), split="test").names) == ["a/1.png"]
    assert list(open_source(str(folder / "val"), split="train").names) == ["a/1.png"]


def test_same_fingerprint_from_the_root_and_from_train(tmp_path):
    folder = write(tmp_path / "x", "train/a/0.png", "val/a/1.png")
    assert open_source(str(folder)).fingerprint() == open_source(str(folder / "train")).fingerprint()


def test_train_may_be_flat(tmp_path):
    source = open_source(str(write(tmp_path / "x", "train/0.png", "train/1.png")))
    assert source.labels is None
    assert len(source) == 2


def test_unknown_split():
    with pytest.raises(ValueError, match="split"):
        open_source("digits", split="val")


# ---- flat folders and lists


def test_flat_folder(tmp_path):
    folder = write(tmp_path / "x", "b.png", "a.png", "sub/z.png", "a.d/q.png", "10.png", "9.png", "t.txt", "s/s/s.png")
    source = open_source(str(folder))
    expected = [
        (Path(r) / f).relative_to(folder).as_posix() for r, _, fs in sorted(os.walk(folder)) for f in sorted(fs)
    ]
    assert list(source.names) == [name for name in expected if name.endswith("png")]
    assert source.labels is None
    assert source.classes == []
    assert source.description.startswith(f"{folder}: 7 images without labels; 10.png and 3 more images lie beside the ")
    assert "labels" in refusal(str(folder), labelled=True)
    for i in range(7):
        source.open(i)


def test_list(tmp_path):
    folder = write(tmp_path / "x", "a b.png", "c/é.png", "#odd.png")
    outside = write(tmp_path / "y", "z.png") / "z.png"
    (folder / "l.txt").write_bytes(f"\ufeff# first\n\n c/é.png \r\n{outside}\na b.png\n./#odd.png\n".encode())
    source = open_source(str(folder / "l.txt"))
    assert list(source.names) == ["c/é.png", str(outside), "a b.png", "./#odd.png"]
    assert source.location(1) == str(outside)
    assert source.labels is None
    for i in range(4):
        assert source.open(i).size == (2, 2)


def test_list_does_not_depend_on_the_working_folder(tmp_path, monkeypatch):
    (write(tmp_path / "x", "0.png") / "l.txt").write_text("0.png\n")
    monkeypatch.chdir("/")
    assert open_source(str(tmp_path / "x" / "l.txt")).open(0).size == (2, 2)


@pytest.mark.parametrize("count", [1, 3])
def test_list_of_missing_files(tmp_path, count):
    folder = write(tmp_path / "x", "0.png")
    (folder / "l.txt").write_text("0.png\n" + "".join(f"gone{i}.png\n" for i in range(count)))
    text = refusal(str(folder / "l.txt"))
    assert f"lists {count + 1} files, of which {count} {'is' if count == 1 else 'are'} missing" in text
    assert str(folder / "gone0.png") in text


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n"])
def test_empty_list(tmp_path, text):
    (tmp_path / "l.txt").write_text(text)
    assert "l.txt" in refusal("l.txt")


def test_list_that_is_no_list(tmp_path):
    (tmp_path / "l.txt").write_bytes(bytes(range(1, 256)) * 20)
    assert "missing" in refusal("l.txt")
    (tmp_path / "l.tar").write_text("x")
    assert "l.tar" in refusal("l.tar")


# ---- refusals


@pytest.mark.parametrize("spec", ["gone", "/gone/away", "", "x" * 5000, "~nobody/x", "a/b.txt", "imagenet"])
def test_what_is_not_there(spec):
    text = refusal(spec)
    assert "demo" in text
    assert "folder" in text
    assert ".txt" in text


@pytest.mark.parametrize(
    ("spec", "near"), [("cifar-10", "cifar10"), ("digit", "digits"), ("stl", "stl10"), ("Demo", "demo")]
)
def test_nearest_name(spec, near):
    assert f"did you mean {near}" in refusal(spec)


def test_folder_without_images(tmp_path):
    (tmp_path / "x").mkdir()
    assert "x contains no images" in refusal("x")
    write(tmp_path / "x", "a/t.txt", "t.txt")
    assert "x contains no images" in refusal("x")
    write(tmp_path / "y", "train/a/t.txt", "val/a/0.png")
    assert "y contains no images" in refusal("y")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_folder(tmp_path):
    folder = write(tmp_path / "x", "a/0.png", "b/0.png")
    (folder / "b").chmod(0)
    assert "cannot be read" in refusal("x")


# ---- names


def test_datasets_root(monkeypatch, tmp_path):
    assert datasets_root() == tmp_path / "sets"
    monkeypatch.delenv("COSS_DATASETS")
    assert str(datasets_root()) == "datasets"


def test_stored_tree_instead_of_a_download(tmp_path):
    for name in ("cifar10", "stl10", "mine"):
        write(tmp_path / "sets" / name, "train/a/0.png", "test/b/1.png")
        assert list(open_source(name).names) == ["a/0.png"]
        assert open_source(name, split="test").classes == ["b"]


def test_a_builtin_name_wins_over_a_folder(tmp_path):
    write(tmp_path / "sets" / "cifar10", "train/a/0.png")
    write(tmp_path / "cifar10", "b/1.png", "b/2.png")
    assert len(open_source("cifar10")) == 1
    assert len(open_source("./cifar10")) == 2


def test_demo(monkeypatch, tmp_path):
    def write_demo(folder):
        written.append(folder)
        return write(folder, "train/a/0.png", "train/b/0.png", "test/a/1.png")

    written = []
    monkeypatch.setitem(sys.modules, "data.demo", types.SimpleNamespace(write_demo=write_demo))
    assert open_source("demo").classes == ["a", "b"]
    assert list(open_source("demo", split="test").names) == ["a/1.png"]
    assert written == [tmp_path / "sets" / "demo"] * 2


def test_demo_that_cannot_be_written(monkeypatch):
    def write_demo(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setitem(sys.modules, "data.demo", types.SimpleNamespace(write_demo=write_demo))
    text = refusal("demo")
    assert "COSS_DATASETS" in text
    assert "Permission denied" in text


def test_digits():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    train, test = open_source("digits", labelled=True), open_source("digits", split="test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.classes == [str(d) for d in range(10)]
    assert train.open(0).size == (8, 8)
    assert train.open(0).mode == "RGB"
    assert np.array_equal(np.asarray(train.open(3))[..., 1], np.rint(digits.images[3] * 255 / 16))
    assert train.fingerprint() != test.fingerprint()


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install scikit-learn" in refusal("digits")


class FakeDownload:
    url = "https://example.org/set.tar.gz"

    def __init__(self, root, download, train=None, split=None):
        self.train, self.split = train, split
        assert download
        self.classes = ["x", "y"]
        self.targets = self.labels = [1, 0, 1]
        self.data = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
        if split:
            self.data = self.data.transpose(0, 3, 1, 2)
            self.labels = np.array([1, 0, -1]) if "unlabeled" in split else np.array([1, 0, 1])


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("labelled", [True, False])
def test_downloaded_sets(monkeypatch, name, split, labelled):
    monkeypatch.setattr(torchvision.datasets, name.upper(), FakeDownload)
    source = open_source(name, split, labelled)
    expected = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    assert all(np.array_equal(np.asarray(source.open(i)), expected[i]) for i in range(3))
    if name == "stl10" and split == "train" and not labelled:
        assert source.labels is None
        assert "unlabeled" in source.description
    else:
        assert source.labels.tolist() == [1, 0, 1]
        assert source.classes == ["x", "y"]


@pytest.mark.parametrize("error", [OSError("no\nroute"), RuntimeError("File not found or corrupted."), ValueError("v")])
def test_failed_download(monkeypatch, tmp_path, error):
    def fail(root, **options):
        raise error

    fail.url = "https://example.org/set.tar.gz"
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    text = refusal("cifar10")
    for part in ("cifar10", fail.url, str(tmp_path / "sets"), " ".join(str(error).split()), "COSS_DATASETS"):
        assert part in text
