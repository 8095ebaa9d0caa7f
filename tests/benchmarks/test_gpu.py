"""benchmarks/gpu.sh: rehearsed as it is on a GPU, and what becomes of parts that fail, hang, or do not fit."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from helpers.interpreter import warm_python

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks/gpu"))

import comparison  # noqa: E402
import job as gpu_job  # noqa: E402
import run as runner  # noqa: E402
from job import Command, Found, Job, Part, members  # noqa: E402

# A pytest that the script starts must not take itself for a worker of this one.
OUTSIDE = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}


def gpu_sh(*words, timeout=900):
    return subprocess.run(["bash", str(ROOT / "benchmarks/gpu.sh"), *map(str, words)], capture_output=True, text=True,
                          env={**OUTSIDE, "PYTHON": warm_python()}, timeout=timeout)


@pytest.mark.parametrize("only", ["works,step,search,colour", "feed", "methods"])
def test_the_rehearsal(only, tmp_path):
    """Every part passes and says its figure; four small files are left, and nothing else."""
    done = gpu_sh("--device", "cpu", "--rehearse", "--minutes", 12, "--only", only, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out/gpu.json").read_text())
    assert list(report["parts"]) == only.split(",")
    for name, part in report["parts"].items():
        assert part["state"] == "passed", (name, part)
        assert part["rows"] or name == "works"
        assert part["title"] in (tmp_path / "out/gpu.md").read_text()
        assert f"{name:9s}passed" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu.json", "gpu.md", "gpu.log"}
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 2 << 20


@pytest.mark.parametrize(("words", "said"), [
    (["--only", "step,stop"], "--only names stop"), (["--data", "/nowhere"], "--data /nowhere is not a folder"),
    (["--device", "cpu"], "--device cpu is for rehearsals"),
])
def test_what_is_refused_in_one_sentence(words, said, tmp_path):
    done = gpu_sh(*words, "--output", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


# ---- parts that go wrong; each is a line of shell


@pytest.fixture
def job(tmp_path):
    for name in ("work", "output"):
        (tmp_path / name).mkdir()
    return Job(sys.executable, "cpu", None, tmp_path / "work", tmp_path / "output", False, 2)


def part(*lines, harvest=lambda job: Found("a figure", ["a row"], {}), limit=60.0):
    return Part("part", "A part", 0, 60, lambda job, seconds: [
        Command(line, ("bash", "-c", line), limit, shell=True) for line in lines], harvest)


def test_a_command_that_fails_does_not_keep_the_next_from_running(job):
    found = runner.play(part("echo no such thing >&2; exit 3", "echo done > $COSS_DATASETS.said; kill -9 $$",
                             "echo fine"), job, 60)
    assert found["state"] == "failed"
    assert [x["wrong"] for x in found["commands"]] == ["exit code 3: no such thing", "killed by signal 9", ""]
    assert (found["figure"], found["rows"]) == ("a figure", ["a row"])
    assert "no such thing" in (job.output / "gpu.log").read_text()


def test_a_command_that_hangs_ends_with_all_that_it_started(job, monkeypatch):
    """Processes in groups of their own, as a loader's workers are, and those deaf to SIGTERM."""
    deaf = ("import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.setpgrp(); "
            "print(os.getsid(0), flush=True); time.sleep(600)")
    line = f"{sys.executable} -c '{deaf}' & wait"
    monkeypatch.setattr(gpu_job, "GRACE", 0.3)
    began = time.monotonic()
    found = runner.play(part(line, "echo next", limit=3.0), job, 60)
    assert time.monotonic() - began < 30
    assert [x["wrong"] for x in found["commands"]] == ["stopped after its 3 s", ""]
    session = int((job.work / "part.0.log").read_text().split()[0])
    assert not members(session)


def test_a_part_has_its_time_and_no_more(job):
    found = runner.play(part("sleep 600", "echo never"), job, 2)
    assert [x["wrong"] for x in found["commands"]] == ["stopped after its 2 s", "not begun, its part's time was over"]


def test_a_part_that_left_half_a_file_is_a_failed_part(job):
    found = runner.play(part("true", harvest=lambda job: json.loads("{")), job, 60)
    assert found["state"] == "failed"
    assert "JSONDecodeError" in found["wrong"][0]


def test_no_part_is_begun_that_would_not_end_in_time(tmp_path):
    done = gpu_sh("--device", "cpu", "--rehearse", "--minutes", 0.2, "--only", "search", "--output", tmp_path / "out")
    assert done.returncode == 0
    assert json.loads((tmp_path / "out/gpu.json").read_text())["parts"]["search"]["state"] == "not begun"
    assert "it needs 15 s" in done.stdout


def test_a_second_go_finds_what_the_first_one_left_of_each_method(job):
    """Scores, logs and the teacher; of the students only one that was not yet held beside the teacher."""
    for name in ("seed-0/linear.json", "seed-0/run/student.pth", "coss-0/linear.json",
                 "coss-0/knn.json", "coss-0/run/config.json", "coss-0/run/student.pth", "coss-0/run/checkpoint.pth",
                 "settings.json", "teacher.pth", "neighbours/closek_info.npy", "neighbours/closek_info.json"):
        path = job.work / "methods" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (job.work / "methods/overlap.json").write_text('{"coss-0": {}}')
    comparison.close(job)
    with tarfile.open(job.output / "methods.tar.gz") as archive:
        kept = {"coss-0/knn.json", "coss-0/linear.json", "coss-0/run/config.json", "overlap.json", "seed-0/linear.json",
                "seed-0/run/student.pth", "settings.json", "teacher.pth"}
        assert {*archive.getnames()} == kept
    again = Job(**{**vars(job), "work": job.work / "again"})
    again.work.mkdir()
    comparison.commands(again, 60)
    found = {str(path.relative_to(again.work / "methods")) for path in again.work.rglob("*") if path.is_file()}
    assert found == kept
