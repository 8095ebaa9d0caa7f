"""Trees of images: ImageFolder's order, what is left out, links, and what tells a tree from another."""

import os

import numpy as np
import pytest
import torchvision
from helpers.trees import refusal, write
from PIL import Image

from data.datasets import open_source
from data.images import BadImage
from runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("root")

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
