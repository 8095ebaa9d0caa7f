"""--help, wrong flags and missing files before the libraries are imported: with none of them there, and what is said is
what the scripts themselves say."""

import json
import os
import subprocess
import sys

import pytest
from helpers.interpreter import ROOT
from helpers.scripts import in_this_process

MISSING = "error: {} nowhere was not found; give an image folder"
NO_FILE = "error: {}nowhere is not a file; give the path of a checkpoint"
REFUSED = {  # a command line: how its sentence begins
    "train_distill.py --data demo --lr 0": "error: argument --lr/--learning-rate: ",
    "train_distill.py --data demo --output o --distil x": "error: unrecognized arguments: --distil x",
    "train_distill.py --data demo --output o --distill nowhere --sampler random": NO_FILE.format("--distill "),
    "train_distill.py --data demo --output o --distill x": "error: --sampler cf needs --closek-info FILE",
    "train_distill.py --data demo --output o --distill assets/demo_teacher.pth --closek-info nowhere":
        "error: --closek-info nowhere does not exist",
    "train_distill.py --data nowhere --output o --sampler random --loss moco": MISSING.format("--data"),
    "train_teacher.py --data demo --output o --moco-k 8": "error: --moco-k 8 is less than --batch-size 256",
    "train_teacher.py --data demo --output o --weights nowhere": NO_FILE.format("--weights "),
    "compute_knn.py mine --data demo --weights nowhere --output o": NO_FILE.format("--weights "),
    "compute_knn.py check nowhere --data demo": "error: nowhere does not exist",
    "evaluate.py knn --data_path demo": "error: the following arguments are required",
    "evaluate.py linear --train nowhere --weights untrained": "error: the following arguments are required: --data",
    "evaluate.py overlap --data demo --weights x nowhere --teacher y": "error: --weights x is not a file",
    "export.py --weights nowhere --to timm --output o.pth": NO_FILE.format("--weights "),
    "embed.py --data nowhere --weights timm:vit --output o.npy": MISSING.format("--data"),
    "inspect_checkpoint.py nowhere": NO_FILE.format(""),
    "train_distill.py --data demo --output o --sampler random --loss moco -a yolov8n":
        "error: -a yolov8n is not a torchvision classifier; give one of torchvision's names (resnet18), timm:NAME ",
    "compute_knn.py eval --data demo --weights untrained --arch resnet19":
        "error: --arch resnet19 is not a torchvision classifier; did you mean resnet18",
    "evaluate.py video --data nowhere --weights untrained --arch resnet18": "error: --data nowhere holds no DAVIS 2017",
    "pack_dataset.py --data nowhere --output o.pack": MISSING.format("--data"),
}
HELP = ["train_distill.py --help all", "train_teacher.py --help all", "compute_knn.py --help", "evaluate.py --help",
        "compute_knn.py mine --help all", "evaluate.py transfer --help all", "export.py --help", "embed.py --help",
        "inspect_checkpoint.py --help all", "pack_dataset.py --help"]
RIGHT = "--weights assets/demo_teacher.pth --to torchvision --output o.pth"
PASSES = """
import contextlib, io, json, sys
from runtime.errors import UserError
from runtime.first_pass import refuse_early
found, before = {}, set(sys.modules)
for line in json.load(sys.stdin):
    sys.argv, out, err = line.split(), io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            refuse_early(sys.argv[0])
        code = None
    except SystemExit as stop:
        code = stop.code
    except UserError as error:
        code, err = error.exit_code, io.StringIO(f"error: {error}\\n")
    found[line] = [code, out.getvalue(), err.getvalue()]
left = {x.partition(".")[0] for x in set(sys.modules) - before} - sys.stdlib_module_names
print(json.dumps([found, sorted(left)]))
"""


@pytest.fixture(scope="module")
def without_libraries(tmp_path_factory):
    """Variables of a Python in which to import torch, torchvision, numpy or PIL ends the process."""
    folder = tmp_path_factory.mktemp("none")
    (folder / "torchvision" / "models").mkdir(parents=True)
    (folder / "torchvision" / "models" / "a.py").write_text("@register_model()\n@of(\n x=1)\ndef resnet18(): ...\n")
    for name in ("torch", "torchvision/__init__", "numpy", "PIL"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} is imported')\n")
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "COLUMNS": "100",
                   "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


@pytest.fixture(scope="module")
def said(without_libraries):
    """{a command line: (exit code, stdout, stderr) of the first pass; the code is None where it goes on}."""
    lines = [*HELP, *REFUSED, "evaluate.py knn --data demo --weights assets/demo_teacher.pth",
             "train_distill.py --data demo --output o --sampler random --loss moco -a resnet18"]
    done = subprocess.run([sys.executable, "-c", PASSES], input=json.dumps(lines), cwd=ROOT, env=without_libraries,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found, left = json.loads(done.stdout)
    assert left == []  # in sys.modules, of what is ours or a library's
    return found


def test_a_wrong_line_is_refused_in_one_sentence(said):
    for line, beginning in REFUSED.items():
        code, out, err = said[line]
        assert (code, out, err.count("\n")) == (2, "", 1), line
        assert err.startswith(beginning), line


def test_the_help_is_that_of_the_script(said, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for line in HELP:
        code, out, err = said[line]
        assert (code, err) == (0, "")
        assert out == in_this_process(*line.split()).out, line


def test_a_line_that_is_right_or_needs_a_library_for_its_answer_goes_on(said):
    assert [out for line, out in said.items() if line not in (*HELP, *REFUSED)] == [[None, "", ""]] * 2


def test_a_script_begins_with_it(without_libraries):
    for words, code, out, err in ((["--help"], 0, "usage: export.py", ""), (["--wrong"], 2, "", "error: the following"),
                                  ([*RIGHT.split()], 1, "", "numpy is imported")):
        done = subprocess.run([sys.executable, "export.py", *words], cwd=ROOT, env=without_libraries,
                              capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout[:len("usage: export.py")], done.stderr[:len(err)]) == (code, out, err)
