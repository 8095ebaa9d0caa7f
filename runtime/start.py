"""The first thing that a root script does, before the imports that take seconds."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys

from runtime.errors import UserError, run_script
from runtime.first_pass import refuse_early

LEAST_FILES = 64  # open at once: libraries, sockets, and pipes of a few workers


def begin(script: str | None = None, reads_proc: bool = False) -> None:
    """Refuse what can be refused at once, and let Ctrl-C end it at once and without a traceback until ``run_script``
    takes over.

    ``script``: the path of one with a ``check_flags``, for :mod:`runtime.first_pass`. ``reads_proc``: it reads a
    process's memory or its cores where only Linux tells them.
    """
    run_script(lambda: check_platform(reads_proc))
    check_open_files()
    if script and "torch" not in sys.modules:
        run_script(lambda: refuse_early(script))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def check_platform(reads_proc: bool = False) -> None:
    """Raise :class:`UserError` on Windows, where a third of what runs need is not there: locks, stop signals, reads at
    a place in a file that workers share, files that are never opened through a link; with ``reads_proc`` also
    elsewhere but on Linux."""
    if importlib.util.find_spec("fcntl") is None:
        raise UserError(f"this needs Linux or macOS, and {sys.platform} has no file locks (fcntl); on Windows run it "
                        "in WSL 2")
    if reads_proc and not hasattr(os, "sched_getaffinity"):
        raise UserError(f"this measures with what only Linux tells (/proc, a process's cores), and this is "
                        f"{sys.platform}; run it on Linux")


def check_open_files() -> None:
    """Refuse a limit of open files so low that imports and workers would fail without naming the cause, or hang."""
    try:
        import resource
    except ImportError:  # not a Unix
        return
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= allowed < LEAST_FILES:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: this process may have {allowed} files open at once (ulimit -n) and needs at least "
                  f"{LEAST_FILES}; start it with more (ulimit -n 4096)", file=sys.stderr)
        sys.exit(2)
