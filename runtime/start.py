"""The first thing that a root script does, before the imports that take seconds."""

from __future__ import annotations

import os
import signal
import sys

LEAST_FILES = 64  # open at once: libraries, sockets, and pipes of a few workers


def begin() -> None:
    """Let Ctrl-C end the script at once and without a traceback until ``run_script`` takes over. Refuse a limit of open
    files so low that imports and workers would fail without naming the cause, or hang."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
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
