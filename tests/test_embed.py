"""embed.py as a person runs it: each ending, names, lengths, resumption, and bad input."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.scripts import assert_refused, in_this_process, well
from PIL import Image
from torchvision.transforms.functional import normalize

from checkpoints.frozen import load_frozen
from data.augment import eval_transform

ROOT = Path(__file__).resolve().parents[1]
TEACHER = ROOT / "assets" / "demo_teacher.pth"
NAMES = ["a/0.png", "a/1 é.png", "b,c/2.png"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(NAMES):
        pixels = np.random.default_rng(number).integers(0, 256, (80, 70 + 9 * number, 3), dtype=np.uint8)
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def expected(photos):
    """One image at a time, by torchvision's normalisation and the bare trunk: float32 [3, 512]."""
    encoder, report = load_frozen(TEACHER)
    pixels = [eval_transform(64)(Image.open(photos / name)).float() / 255 for name in NAMES]
    with torch.no_grad():
        return torch.cat([encoder.backbone(normalize(x, report.mean, report.std)[None]) for x in pixels]).numpy()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


def embed(photos, output, kept, *more):
    return in_this_process("embed.py", "--data", photos, "--weights", TEACHER, "--output", output, "-j", 0,
                           "--features", kept, *more)


def test_npy_and_the_names_of_its_rows(photos, expected, kept, tmp_path):
    done = well(embed(photos, tmp_path / "out/x.npy", kept))
    assert done.out.splitlines()[-1].endswith("x.npy: 3 images of " + str(photos) + ", 512 numbers each")
    rows = np.load(tmp_path / "out/x.npy")
    assert (rows.dtype, rows.shape) == (np.float32, (3, 512))
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-4)
    record = json.loads((tmp_path / "out/x.json").read_text())
    assert record["names"] == NAMES
    assert (record["arch"], record["image_size"], record["normalised"]) == ("squeezenet1_1", 64, False)


def test_rows_of_length_one_in_half_the_bytes(photos, expected, tmp_path):
    well(embed(photos, tmp_path / "x.npy", "none", "--normalise", "--dtype", "float16"))
    rows = np.load(tmp_path / "x.npy")
    assert rows.dtype == np.float16
    np.testing.assert_allclose(rows, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-3)


def test_csv_reads_back_as_the_same_numbers(photos, expected, kept, tmp_path):
    well(embed(photos, tmp_path / "x.npy", kept))
    well(embed(photos, tmp_path / "x.csv", kept))
    header, *lines = csv.reader((tmp_path / "x.csv").open(encoding="utf-8", newline=""))
    assert header == ["path", *map(str, range(512))]
    assert [line[0] for line in lines] == NAMES
    assert np.array_equal(np.array([line[1:] for line in lines], np.float32), np.load(tmp_path / "x.npy"))
    assert "names" not in json.loads((tmp_path / "x.json").read_text())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_parquet(photos, expected, dtype, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    well(embed(photos, tmp_path / "x.parquet", "none", "--dtype", dtype))
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table["path"].to_pylist() == NAMES
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist(), np.float32), expected, rtol=1e-2, atol=1e-2)


def test_images_that_cannot_be_opened(photos, kept, tmp_path):
    broken = tmp_path / "photos"
    for name in NAMES[:2]:
        (broken / name).parent.mkdir(parents=True, exist_ok=True)
        (broken / name).write_bytes((photos / name).read_bytes())
    (broken / "a/0.png").write_bytes(b"not an image")
    assert_refused(embed(broken, tmp_path / "x.npy", kept), ["a/0.png", "--on-bad-image skip"])
    assert not list(tmp_path.glob("x.*"))
    done = well(embed(broken, tmp_path / "x.npy", kept, "--on-bad-image", "skip"))
    assert "1 of 2 images could not be opened and are left out: " in done.out
    assert json.loads((tmp_path / "x.json").read_text())["names"] == NAMES[1:2]
    assert len(np.load(tmp_path / "x.npy")) == 1


@pytest.mark.parametrize(("name", "more", "words"), [
    ("x.pth", [], ["--output", ".npy or .csv or .parquet"]),
    ("x.npy", ["--dtype", "bfloat16"], ["--dtype bfloat16", "float16 or float32"]),
    ("", [], ["--output", "let its name end so"])])
def test_refusals(name, more, words, photos, kept, tmp_path):
    assert_refused(embed(photos, tmp_path / name, kept, *more), words)


def test_the_weights_are_not_overwritten(photos, kept, tmp_path):
    weights = tmp_path / "x.npy"
    weights.write_bytes(TEACHER.read_bytes())
    done = in_this_process("embed.py", "--data", photos, "--weights", weights, "--output", weights, "-j", 0)
    assert_refused(done, ["--output", "is a file that is read here"])
    assert weights.read_bytes() == TEACHER.read_bytes()
