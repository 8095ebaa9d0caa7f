import json
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


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output: .*results.jsonl could not be written"):
        add_result(tmp_path / "file", {})


def test_a_table_is_aligned():
    assert table(ROWS).splitlines() == [
        "data   top1      n     wd",
        "pets  71.25  1,200      –",
        "a|b       –      3  1e-05"]


def test_the_same_in_markdown():
    assert markdown(ROWS).splitlines() == [
        "| data | top1 | n | wd |", "| --- | ---: | ---: | ---: |", "| pets | 71.25 | 1,200 | – |",
        "| a\\|b | – | 3 | 1e-05 |"]
