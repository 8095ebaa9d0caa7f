"""The rules of the house: who may import whom, imports without effects, how text and JSON are read."""

import ast
import graphlib
import os
import subprocess
import sys

import pytest
from helpers.flags import ROOT_SCRIPTS, SHARED, parsed
from helpers.interpreter import ROOT

SKIPPED = {".venv", ".git", "tests", "runs", "datasets", "shared"}
PACKAGES = ("checkpoints", "data", "evals", "losses", "models", "runtime", "search")
MAY_IMPORT = {
    "runtime": {"runtime"},
    "models": {"models", "runtime"},
    "checkpoints": {"checkpoints", "models", "runtime"},
    "search": {"search", "data", "runtime"},
    "losses": {"losses", "runtime"},
    "data": {"data", "runtime"},
    "evals": {"evals", "data", "search", "runtime"},
}


def python_files():
    return sorted(path for path in ROOT.rglob("*.py") if not SKIPPED & set(path.relative_to(ROOT).parts))


def imported(path):
    """(top-level name, line) of every import in a file, those inside functions and TYPE_CHECKING included."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} a relative import"
            yield node.module.partition(".")[0], node.lineno


def modules():
    names = []
    for path in python_files():
        parts = path.relative_to(ROOT).with_suffix("").parts
        if len(parts) == 1 or parts[0] in (*PACKAGES, SHARED):
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def test_the_tree_is_found():
    assert set(PACKAGES) <= {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert {"train_distill", "train_teacher", "compute_knn"} <= set(ROOT_SCRIPTS)
    assert {"common.cli", "losses.coss", "search.exact", "train_distill"} <= set(modules())


@pytest.mark.parametrize("package", PACKAGES)
def test_who_may_import_whom(package):
    ours = {*PACKAGES, SHARED, *ROOT_SCRIPTS}
    wrong = [f"{path.relative_to(ROOT)}:{line} imports {name}" for path in sorted((ROOT / package).rglob("*.py"))
             for name, line in imported(path) if name in ours - MAY_IMPORT[package]]
    assert not wrong


def test_nothing_imports_a_root_script_and_only_they_import_what_they_share():
    wrong = []
    for path in python_files():
        is_script = path.parent in (ROOT, ROOT / SHARED) or path == ROOT / "scripts/detection_torchvision.py"
        forbidden = {*ROOT_SCRIPTS} | (set() if is_script else {SHARED})
        forbidden = forbidden if path.parent != ROOT / "coss" else set()  # which offers them elsewhere
        wrong += [f"{path.relative_to(ROOT)}:{line} imports {name}" for name, line in imported(path)
                  if name in forbidden]
    assert not wrong


def test_no_circle_of_imports():
    """Those inside functions count too."""
    names, graph = set(modules()), {}
    for path in python_files():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(parsed(path)) if name in names else ():
            if isinstance(node, ast.ImportFrom):
                graph.setdefault(name, set()).update(
                    {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} & names - {name})
    assert "data.images" in graph["data.loader"]
    graphlib.TopologicalSorter(graph).prepare()  # names a circle


def test_below_the_root_scripts_no_function_takes_a_namespace():
    wrong = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.FunctionDef):
                    wrong += [f"{path.relative_to(ROOT)}:{node.lineno}" for argument in
                              [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                              if argument.arg == "args"]
    assert not wrong


IMPORT_ALL = """
import importlib, os, pickle, random, sys, threading, warnings
import numpy, torch
from torch.utils import tensorboard  # may warn and draw as it likes: it is not ours
import torchvision, tqdm
def state():
    return pickle.dumps([random.getstate(), [x.tolist() if hasattr(x, "tolist") else x for x in
                         numpy.random.get_state()], torch.get_rng_state().tolist(), torch.get_num_threads(),
                         torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed(), sorted(os.environ),
                         os.getcwd(), torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,
                         torch.cuda.is_initialized(), torch.distributed.is_initialized(),
                         torch.multiprocessing.get_start_method(allow_none=True), threading.active_count(),
                         torch.get_float32_matmul_precision(), warnings.filters])
before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert state() == before, f"importing {name} changed the process"
"""


def test_importing_has_no_effect(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "COSS_DATASETS": "sets"}
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, *modules()], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# ---- text and JSON


def text_opened(path):
    """Lines of a file on which text is read or written without saying that it is UTF-8."""
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        modes = [x.value for x in (*node.args, *(k.value for k in node.keywords if k.arg == "mode"))
                 if isinstance(x, ast.Constant) and isinstance(x.value, str) and set(x.value) <= set("rwaxbt+")]
        is_builtin, is_binary = isinstance(node.func, ast.Name), any("b" in mode for mode in modes)
        is_text = name in ("read_text", "write_text") or (
            name in ("open", "fdopen") and not is_binary and bool(modes or is_builtin))
        encoding = next((k.value for k in node.keywords if k.arg == "encoding"), None)
        said = isinstance(encoding, ast.Constant) and encoding.value in ("utf-8", "utf-8-sig")
        if is_text and not said and "mode" not in {x.id for x in node.args if isinstance(x, ast.Name)}:
            yield node.lineno


def product_files():
    return [path for path in python_files() if path.relative_to(ROOT).parts[0] != "benchmarks"]


def test_text_is_utf8_whatever_the_locale():
    assert [f"{path}:{line}" for path in product_files() for line in text_opened(path)] == []


def test_text_that_does_not_say_utf8_would_be_found(tmp_path):
    (tmp_path / "a.py").write_text(
        'open(x)\nopen(x, "rb")\nx.read_text()\nx.open("w")\nx.open("wb")\nImage.open(x)\nsource.open(3)\n'
        'x.write_text(y, encoding="utf-8")\nos.fdopen(3, "a")\nx.open("r", encoding="latin1")\nopen(x, mode="rb")\n')
    assert sorted(text_opened(tmp_path / "a.py")) == [1, 3, 4, 9, 10]


def test_json_of_files_is_read_in_one_place():
    """runtime.state.parse_json says ValueError for all that is not JSON; json alone ends in RecursionError when it is
    nested deeply. A copy through json writes no file."""
    found = []
    for path in product_files():
        if path.relative_to(ROOT).parts[0] == "scripts" or path.relative_to(ROOT).as_posix() == "runtime/state.py":
            continue  # the scripts' reports read what the same script has written
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.load", "json.loads") and not (
                    ast.unparse(node.args[0]).startswith("json.dumps(")):
                found.append(f"{path}:{node.lineno}")
    assert found == []
