"""What systems other than Linux lack, taken away in a process of its own: what is refused, and what still works."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import coss
from runtime.device import start_process
from runtime.errors import UserError
from runtime.optim import precision

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "from runtime.start import begin" in path.read_text())
TOOLS = sorted(str(path.relative_to(ROOT)) for folder in ("scripts", "benchmarks", "data", "losses")
               for path in (ROOT / folder).rglob("*.py") if "\nif __name__ == \"__main__\":\n" in path.read_text())
WITHOUT = """
import concurrent.futures.process, ctypes, mmap, os, signal, subprocess, sys  # Python's own are Linux's here
def take(owner, names):
    for name in names.split():
        if hasattr(owner, name):
            delattr(owner, name)
take(os, "sched_getaffinity posix_fallocate posix_fadvise memfd_create pidfd_open sendfile")
take(mmap, "MADV_DONTNEED MADV_HUGEPAGE MAP_POPULATE")
sys.platform = PLATFORM
if PLATFORM == "win32":
    take(os, "pread pwrite preadv fork getuid statvfs sysconf O_NOFOLLOW O_CLOEXEC O_NONBLOCK O_DIRECTORY")
    take(signal, "SIGUSR1 SIGUSR2 SIGCHLD SIGKILL SIGBUS SIGALRM SIGHUP")
    sys.modules.update(dict.fromkeys(("fcntl", "resource", "termios", "pwd", "grp")))
"""
IMPORT_ALL = """
import importlib, pathlib, runpy
from runtime.first_pass import _stand_ins
names = [str(path)[:-3].replace(os.sep, ".").removesuffix(".__init__") for package in PACKAGES
         for path in pathlib.Path(package).rglob("*.py")]
assert len(names) > 120, names
with _stand_ins() as finder:
    for name in names:
        importlib.import_module(name)
    for name in NAMES:
        finder.importing, sys.argv = True, [name, "--help"]
        script = runpy.run_path(name, run_name="first pass")
        finder.importing = False
        try:
            script["parse_args"]()
        except SystemExit as end:
            print(name, "ended with", end.code)
"""
HELP = """
import runpy
for name in NAMES:
    sys.argv, sys.path[0] = [name, "--help"], os.path.dirname(name)
    try:
        runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        print(name, "ended with", end.code)
"""


def run(platform, *code, **values):
    text = "".join(f"{name} = {value!r}\n" for name, value in {"PLATFORM": platform, **values}.items())
    return subprocess.run([sys.executable, "-c", text + "".join(code)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False, timeout=120)


def test_on_a_mac_every_module_can_be_imported_and_every_script_shows_its_help():
    done = run("darwin", WITHOUT, IMPORT_ALL, NAMES=SCRIPTS, PACKAGES=[*coss._NAMES, "coss"])
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "ended with" in line] == [
        f"{name} ended with 0" for name in SCRIPTS]
    assert done.stdout.count("usage:") == len(SCRIPTS) >= 8


def test_on_windows_every_script_says_in_a_sentence_what_it_needs():
    names = SCRIPTS + TOOLS
    done = run("win32", WITHOUT, HELP, NAMES=names)
    assert done.stdout.splitlines() == [f"{name} ended with 2" for name in names]
    sentence = ("error: this needs Linux or macOS, and win32 has no file locks (fcntl); on Windows run it in WSL 2")
    assert done.stderr.splitlines() == [sentence] * len(names)


def test_on_a_mac_what_reads_proc_says_so():
    names = [name for name in TOOLS if re.search(r"/proc|sched_getaffinity\(", (ROOT / name).read_text())]
    assert len(names) >= 5
    done = run("darwin", WITHOUT, HELP, NAMES=names)
    assert done.stdout.splitlines() == [f"{name} ended with 2" for name in names]
    assert done.stderr.splitlines() == ["error: this measures with what only Linux tells (/proc, a process's cores), "
                                        "and this is darwin; run it on Linux"] * len(names)


def test_on_windows_the_package_says_so_too():
    done = run("win32", WITHOUT, "import coss\ntry:\n    coss.load\nexcept Exception as error:\n    print(error)\n")
    assert done.stdout.startswith("this needs Linux or macOS"), done.stderr


def test_mps_is_taken_where_torch_has_it(monkeypatch):
    if not torch.backends.mps.is_available():
        with pytest.raises(UserError, match="--device mps is for Macs with Apple silicon"), start_process("mps"):
            pass
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with start_process("mps") as process:
        assert process.device.type == "mps"
        assert precision("auto", process.device) == "off"
        with pytest.raises(UserError, match="--amp fp16 needs a CUDA GPU and this run is on mps"):
            precision("fp16", process.device)
    with pytest.raises(UserError, match="no float64"), start_process("mps", float64=True):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="a single process"), start_process("mps"):
        pass
