"""pack_dataset.py as a person runs it: pack, verify, mine from the pack for the folder, and bad input."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.scripts import script, well
from PIL import Image
from torchvision.datasets import ImageFolder

import pack_dataset
from data.datasets import open_source
from data.neighbours import load_neighbours
from data.packed import PackedSource
from runtime.errors import UserError


@pytest.fixture
def tree(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in "ab":
            for i in range(count):
                path = tmp_path / "tree" / split / name / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return tmp_path / "tree"


def run(monkeypatch, *arguments):
    """The script's main, here."""
    monkeypatch.setattr(sys, "argv", ["pack_dataset.py", *map(str, arguments)])
    pack_dataset.main()


def test_the_script(tree, tmp_path):
    path = tmp_path / "packs" / "train.pack"
    done = script("pack_dataset.py", "--data", tree, "--output", path, "--mode", "jpeg", "--short-side", 32, "-j", 2)
    assert done.rc == 0, done.err
    assert f"{path}: 12 images, " in done.out
    source = PackedSource(path)
    assert source.meta | {"source": ""} == {"mode": "jpeg", "short_side": 32, "quality": 90, "classes": ["a", "b"],
                                           "source": "", "source_fingerprint": source.fingerprint()}
    assert source.fingerprint() == open_source(str(tree)).fingerprint()
    assert source.open(0).size == (40, 32)
    content = bytearray(path.read_bytes())
    content[int(source.records["offset"][7]) + 9] ^= 1
    path.write_bytes(content)
    done = script("pack_dataset.py", "--verify", path)
    assert done.rc == 2
    assert f"damaged: {path}: record {source.names[7]}" in done.out
    assert done.err.splitlines()[-1] == (f"error: --verify {path}: 1 of 12 are damaged, first {source.names[7]}; "
                                            "copy the file again, or pack again")
    assert "Traceback" not in done.err


def test_splits_tars_and_a_second_run(tree, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--data", tree, "--split", "test", "--output", tmp_path / "val.pack", "-j", "0")
    run(monkeypatch, "--verify", tmp_path / "val.pack")
    assert "all 4 records are valid" in capsys.readouterr().out
    run(monkeypatch, "--data", tree, "--split", "test", "--output", tmp_path / "val.pack", "-j", "0")
    assert "(4 of them before)" in capsys.readouterr().out
    subprocess.run(["tar", "cf", tmp_path / "t.tar", "-C", tree, "train"], check=True)
    run(monkeypatch, "--data", tmp_path / "t.tar", "--output", tmp_path / "train.pack", "-j", "0", "--mode", "raw")
    assert PackedSource(tmp_path / "train.pack").fingerprint() == open_source(str(tree)).fingerprint()
    assert PackedSource(tmp_path / "train.pack").short_side == 256


@pytest.mark.parametrize("top", ["data", "."])
def test_the_split_of_a_tar_is_that_of_the_folder(top, tree, tmp_path, monkeypatch):
    """The oracle is torchvision's ImageFolder on what was archived."""
    tree.rename(tmp_path / "data")
    where = ["-C", tmp_path, "data"] if top == "data" else ["-C", tmp_path / "data", "train", "val"]
    subprocess.run(["tar", "cf", tmp_path / "t.tar", *where], check=True)
    for split, part in (("train", "train"), ("test", "val")):
        path = tmp_path / f"{part}.pack"
        run(monkeypatch, "--data", tmp_path / "t.tar", "--split", split, "--output", path, "-j", "0")
        source, expected = PackedSource(path), ImageFolder(tmp_path / "data" / part)
        assert source.classes == expected.classes
        assert source.labels.tolist() == expected.targets
        assert [source.encoded(i) for i in range(len(source))] == [Path(file).read_bytes() for file, _ in expected.imgs]
        assert list(source.names) == [str(Path(file).relative_to(expected.root)) for file, _ in expected.imgs]


def test_a_tar_without_a_test_split_refuses_it(tree, tmp_path, monkeypatch):
    (tree / "val").rename(tree / "cats")  # train is a class among others then
    subprocess.run(["tar", "cf", tmp_path / "t.tar", "-C", tree, "train", "cats"], check=True)
    with pytest.raises(UserError, match=r"--split test: --data .*t\.tar does not hold train/ beside"):
        run(monkeypatch, "--data", tmp_path / "t.tar", "--split", "test", "--output", tmp_path / "x.pack", "-j", "0")
    assert not (tmp_path / "x.pack").exists()
    run(monkeypatch, "--data", tmp_path / "t.tar", "--output", tmp_path / "x.pack", "-j", "0")
    assert PackedSource(tmp_path / "x.pack").classes == ["cats", "train"]


def test_what_is_left_out_is_said(tree, tmp_path, monkeypatch, capsys):
    (tree / "train" / "a" / "3.jpg").write_bytes(b"no")
    arguments = "--data", tree, "--output", tmp_path / "x.pack", "-j", "0"
    with pytest.raises(UserError, match="3.jpg could not be packed"):
        run(monkeypatch, *arguments)
    run(monkeypatch, *arguments, "--on-bad-image", "skip")
    said = capsys.readouterr().out
    assert f"left out: {tree}/train/a/3.jpg (not an image that Pillow can read)" in said
    assert "the fingerprint is not that of --data" in said
    content = (tmp_path / "x.pack").read_bytes()
    run(monkeypatch, *arguments, "--on-bad-image", "skip")  # the same command again: done already, and still said
    again = capsys.readouterr().out.splitlines()
    assert again[1:3] == said.splitlines()[-3:-1]
    assert "x.pack: 11 images (11 of them before)" in again[3]
    with pytest.raises(UserError, match=r"x.pack was started with --on-bad-image skip and leaves out .*3.jpg"):
        run(monkeypatch, *arguments)
    (tree / "train" / "a" / "5.jpg").unlink()
    with pytest.raises(UserError, match="is not a pack of these images"):
        run(monkeypatch, *arguments, "--on-bad-image", "skip")
    assert (tmp_path / "x.pack").read_bytes() == content


@pytest.mark.parametrize(("arguments", "expected"), [
    ([], "give --data and --output"), (["--data", "d"], "give --data and --output"),
    (["--verify", "x", "--output", "y"], "--verify stands alone"),
    (["--data", "d", "--output", "o", "--short-side", "32"], "goes with --mode jpeg or raw"),
    (["--data", "d", "--output", "o", "--mode", "raw", "--quality", "90"], "goes with --mode jpeg"),
    (["--data", "d", "--output", "o", "--quality", "101"], "at most 100"),
])
def test_wrong_command_lines(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        pack_dataset.parse_args(arguments)
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err


def test_several_things_that_are_no_tars(tree, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is not a .tar file"):
        run(monkeypatch, "--data", tree, tree, "--output", tmp_path / "x.pack")


def test_neighbours_mined_from_the_pack_fit_the_folder(tree, tmp_path, monkeypatch):
    path = tmp_path / "train.pack"
    run(monkeypatch, "--data", tree, "--output", path, "-j", "0")
    well(script("compute_knn.py", "mine", "--data", path, "--output", tmp_path, "--weights", "untrained", "--arch",
                "squeezenet_small", "--image-size", 32, "--k", 3, "--workers", 1, "--device", "cpu"))
    folder = open_source(str(tree))
    ids, warnings = load_neighbours(tmp_path / "closek_info.npy", folder.fingerprint(), len(folder), 3)
    assert ids.shape == (12, 3)
    assert not warnings
