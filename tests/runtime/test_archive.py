"""A zip that is not as torch.save wrote it is found out before anything of it is read; zipfile is the oracle."""

import zipfile

import pytest
import torch

from runtime.archive import check_archive, is_archive
from runtime.errors import Damaged


def save(path, **options):
    torch.save({"weight": torch.arange(1000.0), "steps": torch.tensor(3)}, path, **options)
    return path


def rewritten(path, *extra, **options):
    with zipfile.ZipFile(path) as archive:
        records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in [*records, *extra]:
            archive.writestr(name, content)


def test_what_torch_writes_is_sound(tmp_path):
    path = save(tmp_path / "a.pth")
    assert is_archive(path)
    check_archive(path)
    assert not is_archive(save(tmp_path / "b.pth", _use_new_zipfile_serialization=False))


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    check_archive(path)


def test_each_changed_byte_of_a_record_is_found(tmp_path):
    path = save(tmp_path / "a.pth")
    good = path.read_bytes()
    for record in ("data.pkl", "data/0", "version"):
        with zipfile.ZipFile(path) as archive:
            content = archive.read(f"a/{record}")
        start = good.index(content)
        for place in range(start, start + len(content), 1 + len(content) // 20):
            path.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1:])
            with pytest.raises(Damaged, match=f"record a/{record} does not have the CRC-32"):
                check_archive(path)
        path.write_bytes(good)
    check_archive(path)


def test_a_file_that_is_cut_short(tmp_path):
    path = save(tmp_path / "a.pth")
    good = path.read_bytes()
    for length in (4, 100, len(good) // 2, len(good) - 30):
        path.write_bytes(good[:length])
        with pytest.raises(Damaged, match="directory is damaged"):
            check_archive(path)


def test_a_compressed_record_is_refused_unread(tmp_path):
    path = save(tmp_path / "a.pth")
    rewritten(path, ("a/data/9", bytes(50_000_000)), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(Damaged, match="compressed"):
        check_archive(path)


def test_records_that_lie_over_each_other(tmp_path):
    """Many names for the same bytes: uncompressed, and still more than the file has."""
    path = save(tmp_path / "a.pth")
    with zipfile.ZipFile(path, "a") as archive:
        entry = archive.getinfo("a/data/0")
        for number in range(9):
            twin = zipfile.ZipInfo(f"a/data/{number + 5}")
            for field in ("CRC", "file_size", "compress_size", "header_offset"):
                setattr(twin, field, getattr(entry, field))
            archive.filelist.append(twin)
        archive._didModify = True
    with pytest.raises(Damaged, match="claim more bytes"):
        check_archive(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_records_of_one_name(tmp_path):
    path = save(tmp_path / "a.pth")
    rewritten(path, ("a/data/0", bytes(4000)))
    with pytest.raises(Damaged, match="two records of one name"):
        check_archive(path)
