import json
import os
import resource
import signal
import threading

import pytest

from evals.results import RESULTS, add_result, markdown, read_results, table
from runtime.errors import UserError

ROWS = [{"data": "pets", "top1": 71.25, "n": 1200}, {"data": "a|b", "top1": None, "n": 3, "wd": 1e-5}]


def test_lines_of_many_writers_stay_whole(tmp_path):
    def write(number):
        for _ in range(20):
            add_result(tmp_path, {"number": number, "padding": "x" * 5000})

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = [json.loads(line) for line in (tmp_path / RESULTS).read_text().splitlines()]
    assert sorted(record["number"] for record in records) == sorted(list(range(4)) * 20)
    assert all("time" in record for record in records)


def test_a_line_cut_short_is_passed_over(tmp_path):
    assert read_results(tmp_path / RESULTS) == []
    add_result(tmp_path, {"a": 1})
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"a": 2, "b"\n')
    add_result(tmp_path, {"a": 3})
    assert [record["a"] for record in read_results(tmp_path / RESULTS)] == [1, 3]


@pytest.mark.parametrize("end", ["", '{"a": 2, "b', "\xff"])
def test_a_record_never_joins_what_was_left_without_an_end(tmp_path, end, capsys):
    add_result(tmp_path, {"a": 1})
    path = tmp_path / RESULTS
    path.write_bytes(path.read_bytes().rstrip(b"\n") + (b"\n" + end.encode("latin1") if end else b""))
    add_result(tmp_path, {"a": 3})
    assert [record["a"] for record in read_results(path)] == [1, 3]
    assert ("1 of 3 lines" in capsys.readouterr().err) is bool(end)
    assert path.read_bytes().endswith(b"}\n")


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path):
    add_result(tmp_path, {"a": 1})
    path, limits = tmp_path / RESULTS, resource.getrlimit(resource.RLIMIT_FSIZE)
    before = path.read_bytes()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))  # room for a part of the next line
    try:
        with pytest.raises(UserError, match=r"results.jsonl could not be written \(File too large\)"):
            add_result(tmp_path, {"a": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    add_result(tmp_path, {"a": 3})
    assert [record["a"] for record in read_results(path)] == [1, 3]


def test_lines_that_are_no_records_are_passed_over(tmp_path, capsys):
    (tmp_path / RESULTS).write_bytes(b'[1]\n3\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"a": 1}\n')
    assert read_results(tmp_path / RESULTS) == [{"a": 1}]
    said = f"{tmp_path / RESULTS}: 4 of 5 lines are not valid records and are skipped\n"
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_only_a_regular_file_is_added_to(tmp_path, make):
    make(tmp_path / RESULTS)
    with pytest.raises(UserError, match="--output .*results.jsonl is a"):
        add_result(tmp_path, {})


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .* cannot be made, since .*file is not a folder"):
        add_result(tmp_path / "file", {})


def test_a_table_is_aligned():
    assert table(ROWS).splitlines() == [
        "data   top1      n     wd",
        "pets  71.25  1,200      –",
        "a|b       –      3  1e-05"]


def test_a_wide_table_continues_below():
    assert table(ROWS, 18).splitlines() == [
        "data   top1      n", "pets  71.25  1,200", "a|b       –      3", "", "data     wd", "pets      –",
        "a|b   1e-05"]
    assert table(ROWS, 1).split("\n\n")[1].splitlines() == ["data      n", "pets  1,200", "a|b       3"]


def test_the_same_in_markdown():
    assert markdown(ROWS).splitlines() == [
        "| data | top1 | n | wd |", "| --- | ---: | ---: | ---: |", "| pets | 71.25 | 1,200 | – |",
        "| a\\|b | – | 3 | 1e-05 |"]
