"""The one exception that is meant for people, and the wrapper that prints it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

EXIT_BAD_INPUT, EXIT_STOPPED = 2, 3


class UserError(Exception):
    """Bad input, said in one sentence: the file or flag, what was found, what was expected, what to do.

    ``every_process`` says that each process meets the same error (a wrong flag), so that one line a machine
    is enough; an error of one process alone (a broken image) is printed by that process.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str, every_process: bool = True) -> None:
        super().__init__(printable(message))
        self.every_process = every_process


def printable(text: str) -> str:
    """``text`` on one line and without control codes, since parts of it come from files."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class RunStopped(UserError):
    """A run that cannot go on (a loss that is not finite), said in one sentence."""

    exit_code = EXIT_STOPPED


def run_script(main: Callable[[], None]) -> None:
    """Run a root script's ``main`` and turn a :class:`UserError` into one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        if not error.every_process or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output (head, less) went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
