"""The repository's scripts, run in three ways, the quickest that shows what is meant:

- :func:`in_this_process`: for runs that end before they begin, and whatever needs a single process,
- :func:`script`: in a process of its own, or several under torchrun, by :mod:`helpers.interpreter`,
- :func:`launched`: the same by a fresh interpreter, for what that itself does.
"""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from collections import namedtuple

from helpers.at_step import follow
from helpers.interpreter import ROOT, warm_python

AT_STEP = "tests/helpers/at_step.py"
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
Done = namedtuple("Done", "rc out err")


def well(done):
    assert done.rc == 0, done.out + done.err
    return done


def assert_refused(done, words):
    """Exit code 2 and one sentence, which holds ``words``."""
    assert done.rc == 2, done.err
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err + done.out
    for word in words:
        assert word in done.err


def in_this_process(name, *arguments):
    """Run the file as ``__main__`` here."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, [name, *map(str, arguments)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    return Done(code, out.getvalue(), err.getvalue())


def at(plan, name, *arguments):
    """In this process, with ``plan`` (see helpers/at_step.py, which is a script that does it in another)."""
    undo = follow(plan)
    try:
        return in_this_process(name, *arguments)
    finally:
        undo()


def script(name, *arguments, processes=0, restarts=0, cwd=None, timeout=240, python=None):
    """Run the file in a process of its own, or in so many under torchrun."""
    launcher = [python or warm_python()]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
                     "--max-restarts", str(restarts)]
    environment = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    done = subprocess.run([*launcher, str(ROOT / name), *map(str, arguments)], capture_output=True, text=True,
                          cwd=cwd, env=environment, timeout=timeout)
    return Done(done.returncode, done.stdout, done.stderr)


def launched(name, *arguments, **more):
    """The same by a fresh interpreter."""
    return script(name, *arguments, python=sys.executable, **more)
