"""The demo images are written once, and again where their record is of others or damaged."""

import json

import pytest

from data.demo import write_demo


@pytest.mark.parametrize("note", [b"[" * 100_000, b"\xff", b"{}", b"", None])
def test_a_record_that_is_damaged_or_of_others(tmp_path, note):
    root = write_demo(tmp_path / "demo", 1, 1, size=8)
    about, file = json.loads((root / "demo.json").read_bytes()), next((root / "train").rglob("*.jpg"))
    made = file.read_bytes()
    file.write_bytes(b"changed")
    write_demo(root, 1, 1, size=8)
    assert file.read_bytes() == b"changed"  # it was left alone
    (root / "demo.json").unlink() if note is None else (root / "demo.json").write_bytes(note)
    write_demo(root, 1, 1, size=8)
    assert file.read_bytes() == made
    assert json.loads((root / "demo.json").read_bytes()) == about
