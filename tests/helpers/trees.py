"""Trees of tiny images in a folder of the test's own, and how --data refuses."""

import pytest
from PIL import Image

from data.datasets import open_source
from runtime.errors import UserError


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The working folder of the test, below which named data sets are looked for."""
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
