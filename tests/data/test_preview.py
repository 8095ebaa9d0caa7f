"""The contact sheet shows what training sees."""

import numpy as np
import pytest
from PIL import Image

from data.augment import augmentation, eval_transform
from data.loader import ViewDataset
from data.preview import GAP, LABEL, main
from data.sources import FileSource
from runtime.errors import UserError

SIZE = 24


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def sheet(folder, *more):
    out = folder.parent / "sheet.png"
    main(["--output", str(out), "--data", str(folder), "--image-size", str(SIZE), "--images", "2", "--views", "3",
          *more])
    return np.asarray(Image.open(out))


@pytest.mark.parametrize("path", ["fast", "pil", "both"])
def test_rows_are_images_and_columns_views(folder, path, capsys):
    picture = sheet(folder, "--data-path", path, "--seed", "5", "--aug", "swav")
    source = FileSource(folder, ["0.png", "1.png", "2.png"], None, [], "x")
    paths = ("fast", "pil") if path == "both" else (path,)
    top = LABEL
    for number, row in enumerate((0, 2)):
        top += LABEL
        for one in paths:
            keys = [(row, stamp) for stamp in range(number * 3, number * 3 + 3)]
            views = ViewDataset(source, [augmentation("swav", SIZE)], 5, one).__getitems__(keys).views[0]
            for column, view in enumerate([eval_transform(SIZE)(source.open(row)), *views]):
                left = GAP + column * (SIZE + GAP)
                assert np.array_equal(picture[top : top + SIZE, left : left + SIZE], view.permute(1, 2, 0))
            top += SIZE + GAP
    assert picture.shape == (top, GAP + 4 * (SIZE + GAP), 3)
    assert "sheet.png: 2 images" in capsys.readouterr().out


def test_a_sheet_is_a_png_and_never_one_of_the_images(folder):
    before = (folder / "0.png").read_bytes()
    places = {folder / "0.png": "is a file that is read here", folder.parent / "x.npy": r"is written as \.png",
              folder: "let its name end so"}
    for path, words in places.items():
        with pytest.raises(UserError, match=words):
            main(["--output", str(path), "--data", str(folder)])
    assert (folder / "0.png").read_bytes() == before


def test_what_cannot_be_drawn_is_said_in_a_sentence(folder):
    with pytest.raises(UserError, match="0.png cannot be made, since .* is not a folder"):
        main(["--output", str(folder / "0.png" / "x.png"), "--data", str(folder), "--images", "1"])
    (folder / "0.png").write_bytes(b"words")
    with pytest.raises(UserError, match=r"0\.png \(not an image"):
        sheet(folder)
    with pytest.raises(UserError, match="--views must be at least 1"):
        sheet(folder, "--views", "0")
