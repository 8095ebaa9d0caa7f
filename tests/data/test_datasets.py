"""Sources: ImageFolder's order, splits, lists, named sets, subsets, fingerprints, and each refusal."""

import hashlib
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from data.datasets import ArraySource, ImageSource, datasets_root, open_source
from data.images import BadImage
from data.sources import Names
from runtime.errors import UserError


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("COSS_DATASETS", str(tmp_path / "sets"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder, *names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".gif", ".bmp"):
            Image.new("RGB", (2, 2), (number, 0, 0)).save(path, "PNG")
        else:
            path.write_text("not an image")
    return folder


def refusal(*args, flag="--data", **options):
    with pytest.raises(UserError) as caught:
        open_source(*args, **options)
    text = str(caught.value)
    assert text.startswith(flag)
    assert "\n" not in text
    return text


TREE = [
    "b/2.png",
    "b/10.png",
    "b/1.JPG",
    "B/x.png",
    "a/deep/er/z.png",
    "a/deep/a.png",
    "a/deep-er/q.png",
    "a/y.png",
    "a/Y.png",
    "c/notes.txt",
    "c/only.jpeg",
    "été/ü.png",
    "with space/a b.png",
    "10/a.png",
    "9/a.png",
    "b/.hidden.png",
]


# ---- trees


def test_order_is_image_folders(tmp_path):
    folder = write(tmp_path / "x", *TREE)
    source = open_source(str(folder))
    (folder / "b" / ".hidden.png").unlink()  # ImageFolder takes it
    oracle = torchvision.datasets.ImageFolder(folder)
    assert [source.location(i) for i in range(len(source))] == [path for path, _ in oracle.samples]
    assert source.labels.tolist() == oracle.targets
    assert source.labels.dtype == np.int64
    assert source.classes == oracle.classes
    for i in range(len(source)):
        assert np.array_equal(np.asarray(source.open(i)), np.asarray(oracle[i][0]))


@pytest.mark.parametrize("seed", range(5))
def test_order_of_random_trees_is_image_folders(tmp_path, seed):
    rng = np.random.default_rng(seed)
    words = ["a", "A", "a.b", "a-b", "a_b", "b", "n01", "n1", "ab", "z"]
    names = {"/".join(rng.choice(words, rng.integers(2, 5))) + f"/{rng.integers(99)}.png" for _ in range(40)}
    folder = write(tmp_path / "x", *sorted(names))
    source = open_source(str(folder))
    oracle = torchvision.datasets.ImageFolder(folder)
    assert [source.location(i) for i in range(len(source))] == [path for path, _ in oracle.samples]
    assert source.labels.tolist() == oracle.targets


def test_symlinks_are_followed_as_in_image_folder(tmp_path):
    elsewhere = write(tmp_path / "y", "1.png", "in/2.png")
    folder = write(tmp_path / "x", "a/0.png")
    (folder / "b").symlink_to(elsewhere)
    (folder / "a" / "more").symlink_to(elsewhere)
    source = open_source(str(folder))
    assert [source.location(i) for i in range(5)] == [p for p, _ in torchvision.datasets.ImageFolder(folder).samples]


def test_empty_and_hidden_folders_are_left_out(tmp_path):
    folder = write(tmp_path / "x", "b/1.png", "a/0.png", "empty/readme.txt", ".cache/0.png", "a/.thumbs/0.png")
    (folder / "none").mkdir()
    source = open_source(str(folder))
    assert list(source.names) == ["a/0.png", "b/1.png"]
    assert source.classes == ["a", "b"]
    assert source.labels.tolist() == [0, 1]


def test_hidden_files_and_unread_endings_are_left_out_and_counted(tmp_path):
    visible = ["a/0.png", "b/1.png", "b/2.png"]
    folder = write(tmp_path / "x", *visible, "a/._0.png", "b/._1.png", "._x.png", "__MACOSX/a/._0.png", "b/3.heic",
                   "b/.4.heic", "a/notes.txt")
    source = open_source(str(folder))
    assert list(source.names) == visible
    assert source.classes == ["a", "b"]
    left = "skipped: 4 hidden files, ._x.png first and 1 file that this Pillow cannot read (.heic), b/3.heic"
    assert list(source.notes) == [f"{left} and __MACOSX"]
    assert source.description.endswith(f"; {left} and __MACOSX")
    assert source.subset(0.5).notes == source.notes
    names = sorted(path.relative_to(tmp_path).as_posix() for path in folder.rglob("*.*") if path.suffix != ".txt")
    (tmp_path / "list.txt").write_text("\n".join(names))
    listed = open_source(str(tmp_path / "list.txt"))
    assert list(listed.names) == [f"x/{name}" for name in visible]
    assert listed.notes[0].startswith("skipped: 5 hidden files, x/._x.png first and 1 file that this Pillow")


def test_a_list_in_a_hidden_folder_names_its_files_by_absolute_paths(tmp_path):
    folder = write(tmp_path / ".cache", "a/0.png", "a/._0.png")
    (tmp_path / "list.txt").write_text(f"{folder}/a/0.png\n{folder}/a/._0.png\n")
    assert list(open_source(str(tmp_path / "list.txt")).names) == [f"{folder}/a/0.png"]


@pytest.mark.parametrize("ending", [".jfif", ".avif"])
def test_endings_that_this_pillow_reads(tmp_path, ending):
    if ending not in Image.registered_extensions():
        pytest.skip("not by this Pillow")
    (tmp_path / "x" / "a").mkdir(parents=True)
    Image.new("RGB", (16, 16), (9, 99, 200)).save(tmp_path / "x" / "a" / f"0{ending}")
    source = open_source(str(tmp_path / "x"))
    assert list(source.names) == [f"a/0{ending}"]
    assert np.abs(np.asarray(source.open(0)).astype(int) - (9, 99, 200)).max() < 4


def test_a_stray_image_beside_class_folders_is_named_and_refused_where_it_matters(tmp_path):
    folder = write(tmp_path / "x", "a/0.png", "b/1.png", "stray.png")
    source = open_source(str(folder))
    mixture = "stray.png lies beside the folders a/, b/, so no image has a label"
    assert (len(source), source.labels, list(source.notes)) == (3, None, [mixture])
    assert mixture in refusal(str(folder), labelled=True)
    with pytest.raises(UserError, match=r"--subset 0.5 takes a fraction of each class, but .* stray.png lies beside"):
        source.subset(0.5)
    assert len(open_source(str(write(tmp_path / "flat", "0.png", "1.png"))).subset(0.5)) == 1
    splits = write(tmp_path / "y", "train/a/0.png", "val/a/1.png", "stray.png")
    assert "has images directly beside train/, val/" in refusal(str(splits))


def test_links_in_circles_are_not_followed_and_folders_met_twice_are_said(tmp_path):
    folder = write(tmp_path / "x", "a/0.png", "b/1.png", "b/in/2.png")
    for place in ("a/up", "b/in/up", "loop"):
        (folder / place).symlink_to(folder)
    (folder / "b" / "in" / "self").symlink_to("self")
    source = open_source(str(folder))
    assert list(source.names) == ["a/0.png", "b/1.png", "b/in/2.png"]
    assert source.classes == ["a", "b"]
    assert list(source.notes) == ["a/up is a link to a folder that contains it, and is not followed, nor are 2 more"]
    (folder / "c").symlink_to(folder / "a")
    source = open_source(str(folder))
    assert list(source.names) == ["a/0.png", "b/1.png", "b/in/2.png", "c/0.png"]
    assert "a and c are the same folder, by a link, so its images count twice" in source.notes


def test_folders_that_link_to_one_another_end(tmp_path):
    folder = write(tmp_path / "x", *(f"{i}/0.png" for i in range(8)))
    for i in range(8):
        for j in range(8):
            (folder / str(i) / f"to{j}").symlink_to(folder / str(j))
    assert "by more than 100 paths" in refusal(str(folder))


@pytest.mark.parametrize("name", ["a/1.png", "list.txt", "x.pack"])
def test_a_fifo_is_not_waited_for(tmp_path, name):
    folder = write(tmp_path / "x", "a/0.png")
    os.mkfifo(folder / name)
    if name.startswith("a/"):
        source = open_source(str(folder))
        for way in (source.open, source.encoded, source.pixels):
            with pytest.raises(BadImage, match="not a regular file"):
                way(1)
    else:
        refusal(str(folder / name))


def test_gif_counts_as_an_image(tmp_path):
    assert list(open_source(str(write(tmp_path / "x", "a/0.gif"))).names) == ["a/0.gif"]


def test_description_and_home(tmp_path, monkeypatch):
    folder = write(tmp_path / "x", "a/0.png", "b/0.png")
    assert open_source(str(folder)).description == f"{folder}: 2 images in 2 classes"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_source("~/x")) == 2
    assert len(open_source("x")) == 2
    assert len(open_source("./x/")) == 2


def test_the_identity_knows_sizes_and_times(tmp_path):
    folder = write(tmp_path / "x", "a/0.png", "a/1.png", "b/2.png")
    first = open_source(str(folder))
    assert open_source(str(folder)).identity() == first.identity()
    assert first.identity().startswith(first.fingerprint())
    untimed = first.identity(times=False)
    seen, times = {first.identity()}, (folder / "a" / "1.png").stat()
    os.utime(folder / "a" / "1.png", ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    seen.add(open_source(str(folder)).identity())
    assert open_source(str(folder)).fingerprint() == first.fingerprint()
    assert open_source(str(folder)).identity(times=False) == untimed not in seen
    (folder / "a" / "1.png").write_bytes((folder / "a" / "1.png").read_bytes() + b"\0")
    os.utime(folder / "a" / "1.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    seen.add(open_source(str(folder)).identity())
    assert open_source(str(folder)).identity(times=False) != untimed
    (folder / "a" / "1.png").unlink()
    seen.add(open_source(str(folder)).identity())
    assert len(seen) == 4
    assert first.take(np.array([0])).identity() == open_source(str(folder)).take(np.array([0])).identity()


def test_a_broken_image_says_so_when_opened(tmp_path):
    folder = write(tmp_path / "x", "a/0.png")
    (folder / "a" / "1.png").write_bytes(b"no")
    source = open_source(str(folder))
    source.open(0)
    with pytest.raises(BadImage):
        source.open(1)


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


# ---- sources


def array_source(labels):
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    return ArraySource(images, np.array(labels), ["a", "b", "c"], "made/train")


def test_fingerprint_is_of_the_names_in_order(tmp_path):
    source = open_source(str(write(tmp_path / "x", "a/0.png", "b/é.png")))
    assert source.fingerprint() == hashlib.sha256("a/0.png\nb/é.png\n".encode()).hexdigest()
    other = open_source(str(write(tmp_path / "y", "a/0.png", "b/é.png")))
    assert other.fingerprint() == source.fingerprint()
    assert source.take(np.array([1, 0])).fingerprint() != source.fingerprint()
    assert source.take(np.array([0, 1])).fingerprint() == source.fingerprint()


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.29, 0.5, 0.99])
def test_subset_takes_the_first_of_each_class(fraction):
    labels = np.random.default_rng(0).integers(0, 3, 1000).tolist()
    source = array_source(labels)
    part = source.subset(fraction)
    expected = []
    for c in range(3):
        members = [i for i, label in enumerate(labels) if label == c]
        expected += members[: int(fraction * len(members))]
    assert list(part.names) == [source.names[i] for i in expected]
    assert part.labels.tolist() == [labels[i] for i in expected]
    assert part.classes == source.classes
    assert all(np.asarray(part.open(j))[0, 0, 0] == i % 256 for j, i in enumerate(expected))
    assert f"subset {fraction:g}" in part.description
    assert part.fingerprint() != source.fingerprint()


def test_subset_of_a_hundred_is_not_rounded_down():
    assert len(array_source([0] * 100).subset(0.29)) == 29
    assert len(array_source([0] * 100).subset(0.57)) == 57


def test_whole_subset_is_the_source():
    source = array_source([2, 0, 1])
    assert source.subset(1) is source
    assert source.subset(1.0).fingerprint() == source.fingerprint()


def test_subset_without_labels(tmp_path):
    source = open_source(str(write(tmp_path / "x", *(f"{i}.png" for i in range(10)))))
    assert list(source.subset(0.35).names) == ["0.png", "1.png", "2.png"]


def test_subset_of_files_opens_the_right_files(tmp_path):
    source = open_source(str(write(tmp_path / "x", *(f"{c}/{i}.png" for c in "ab" for i in range(4)))))
    part = source.subset(0.5)
    assert list(part.names) == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    assert [np.asarray(part.open(i))[0, 0, 0] for i in range(4)] == [0, 1, 4, 5]
    assert len(source) == 8


@pytest.mark.parametrize("fraction", [0, -0.5, 1.01, float("nan"), float("inf"), 0.001])
def test_bad_subset(fraction):
    with pytest.raises(UserError) as caught:
        array_source([0, 1, 2]).subset(fraction)
    assert str(caught.value).startswith(f"--subset {fraction:g}")
    assert "\n" not in str(caught.value)


def test_sources_pickle(tmp_path):
    folder = write(tmp_path / "x", "a/0.png", "b/1.png")
    for source in (open_source(str(folder)), array_source([0, 1])):
        again = pickle.loads(pickle.dumps(source))
        assert isinstance(again, ImageSource)
        assert list(again.names) == list(source.names)
        assert np.array_equal(np.asarray(again.open(1)), np.asarray(source.open(1)))


@pytest.mark.parametrize("strings", [[], ["a"], ["", "", "x"], ["é" * 3, "a\nb", "\udcff", "z"]])
def test_names(strings):
    names = Names(iter(strings))
    assert list(names) == strings
    assert len(names) == len(strings)
    assert names[:2] == strings[:2]
    assert names[::-1] == strings[::-1]
    assert [names[-i - 1] for i in range(len(strings))] == strings[::-1]
    for past in (len(strings), -len(strings) - 1):
        with pytest.raises(IndexError):
            names[past]


def test_a_source_that_cannot_open():
    with pytest.raises(NotImplementedError):
        ImageSource(["a"], None, [], "t").open(0)
    assert ImageSource(["a"], None, [], "t").location(0) == "a"
