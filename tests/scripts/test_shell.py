"""The shell scripts: what stands in a variable is a word, never a command, a file name or half a page of torchrun's."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A script as it is, but for the environment, which is not made, and Python, which prints its command line.
STUB = """source() { . "$@"; environment() { PYTHON=python; }; }
python() { case "$1 $2" in -c*) echo 0 ;; *losses.tables) echo 8 teacher ;; *) printf '%s\\n' "$@" ;; esac; }
exec() { "$@"; }
. "$0"
"""
LAUNCHING = [("cf_train.sh", "resnet18"), ("methods.sh", "seed"), ("compute_knn.sh", "mine", "resnet18")]


def run(script, *words, cwd=ROOT, **variables):
    clean = {name: value for name, value in os.environ.items() if name not in ("GPUS", "RESTARTS", "NODES", "CDPATH")}
    return subprocess.run(["bash", "-c", STUB, f"scripts/{script}", *words], cwd=cwd, env={**clean, **variables},
                          capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("variable", ["PASSES", "FACTOR", "EPOCHS", "BATCH", "GPUS", "MINUTES", "SEEDS"])
def test_a_variable_runs_no_command(variable, tmp_path):
    value = f"CARDS[$(touch${{IFS}}{tmp_path}/ran)]"
    done = run("compare_methods.sh", DATA="demo", **{variable: value})
    assert value in done.stdout.split("\n"), done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("variable", ["METHODS", "SEEDS"])
def test_a_list_is_words_and_no_file_names(variable):
    done = run("compare_methods.sh", DATA="demo", **{variable: "* c*"})
    words = done.stdout.split("\n")
    assert words[words.index("*") + 1] == "c*"


@pytest.mark.parametrize("words", LAUNCHING, ids=" ".join)
@pytest.mark.parametrize(("variable", "value"), [("GPUS", "abc"), ("GPUS", "0"), ("GPUS", "-1"), ("GPUS", "9" * 400),
                                                 ("RESTARTS", "x[$(echo)]"), ("NODES", "two")])
def test_processes_that_are_no_number(words, variable, value):
    done = run(*words, **{variable: value, "RENDEZVOUS": "h:1", "JOB": "j", "NODE_RANK": "0"})
    assert done.returncode == 2
    least = 0 if variable == "RESTARTS" else 1
    said = f"error: {variable}={value} is not a whole number of at least {least}; set {variable} to one\n"
    assert done.stderr == said
    assert not done.stdout


@pytest.mark.parametrize("words", LAUNCHING, ids=" ".join)
def test_processes_are_started(words):
    assert "\n--nproc_per_node\n3\n--max-restarts\n2\n" in run(*words, GPUS="3", RESTARTS="2").stdout


def test_cdpath_sends_scripts_nowhere_else(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "compute_knn.py").touch()
    shown = subprocess.run(["bash", "-c", "source scripts/_env.sh; pwd"], cwd=ROOT, capture_output=True, text=True,
                           env={**os.environ, "CDPATH": str(tmp_path)}, timeout=30)
    assert shown.stdout == f"{ROOT}\n"


def refused(capsys, **changed):
    import compare_run
    given = {"data": "demo", "teacher": "t", "output": "o", "student": "s", "stem": "cifar", "rates": "r",
             "passes": "9", "epochs": "1", "batch": "8", "nearest-k": "1", "total-k": "7", "queue": "9", "every": "0",
             "gpus": "1", "jobs": "0", "workers": "0", "subset": "1", "minutes": "0", "methods": "coss", "seeds": "0",
             "factor": "4"}
    with pytest.raises(SystemExit) as stop:
        compare_run.parse_args([f"--{name}={value}" for name, value in {**given, **changed}.items()])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("changed", "said"), [
    ({"passes": "-5"}, "PASSES: '-5' is not a whole number at least 1"), ({"batch": "0"}, "BATCH: '0'"),
    ({"nearest-k": "x"}, "NEAREST_K: 'x'"), ({"subset": "inf"}, "SUBSET: 'inf'"),
    ({"minutes": "nan"}, "MINUTES: 'nan'"), ({"factor": "1"}, "FACTOR: '1'"),
    ({"gpus": "9" * 400}, "GPUS: '999")])
def test_a_variable_that_is_no_number_is_named(changed, said, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    err = refused(capsys, **changed)
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1
