"""The exception for user errors, how a run ends, and the wrapper that turns both into messages and exit codes."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable

from runtime.screen import folded

EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_LOST, EXIT_PAUSED = 2, 3, 4, 75  # 75 is sysexits' EX_TEMPFAIL: try again
# Codes that a terminal obeys or that reverse text, except line ends, tabs and the cursor-up of progress bars.
CODES = re.compile("(?!\x1b\\[A)[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
OF_A_NAME = {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EROFS}  # for a path
SHOWN = 200  # characters of a path
WAIT_FOR_LAUNCHER = 10.0  # seconds to wait after losing a peer, so that torchrun reports the process that died


class UserError(Exception):
    """Bad input, explained in one sentence: the file or flag, what was found, what was expected, what to do.

    ``every_process``: every process has the same error (a wrong flag), so one line per machine is enough; otherwise (a
    broken image) the process that has the error prints it.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str, every_process: bool = True) -> None:
        super().__init__(printable(message))
        self.every_process = every_process


def printable(text: str) -> str:
    """``text`` on one line and without control codes, since parts of it come from files."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class Damaged(Exception):
    """A damaged file. The message says how it is damaged; the caller adds what to do."""


class RunStopped(UserError):
    """A run that cannot continue (a loss that is not finite, no memory left), explained in one sentence."""

    exit_code = EXIT_STOPPED


class NotFinite(UserError):
    """Features with NaN or infinity. For a network from a file the message says what to check; for one in training only
    ``found`` applies."""

    def __init__(self, found: str, advice: str, every_process: bool = True) -> None:
        super().__init__(f"{found}; {advice}", every_process)
        self.found = printable(found)

    def __reduce__(self) -> tuple[type, tuple[str, str, bool]]:
        return type(self), (self.found, str(self).removeprefix(f"{self.found}; "), self.every_process)


class PeerLost(UserError):
    """Another process of the job has ended, so this one cannot continue; the other one reports its error itself."""

    exit_code = EXIT_LOST

    def __init__(self, message: str = "the connection to another process of this job broke, so this one ends too; that "
                 "process or torchrun's report says what happened; start the same command again to resume from the "
                 "last checkpoint", every_process: bool = True) -> None:
        super().__init__(message, every_process)


class RunPaused(Exception):
    """A signal ended the run after its checkpoint was written; started again, it resumes.

    The exit code is 75, or 0 under ``torchrun --max-restarts N``, which would treat 75 as a failure and restart.
    """

    @property
    def exit_code(self) -> int:
        return EXIT_PAUSED if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0" else 0


def run_script(main: Callable[[], None], *, less_memory: str = "lower --batch-size") -> None:
    r"""Run a root script's ``main``; turn a :class:`UserError` into one line on stderr and its exit code.

    ``less_memory``: the advice for running out of memory, which is one line too. Under torchrun the error is also
    written to torchrun's error file, so that its report begins with the rank that failed first. Characters that the
    terminal's encoding lacks are printed as escapes (\u2026), and control codes, which names of files, classes and
    tensors may contain, are replaced.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set in runtime.start
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _prepare_streams()
    try:
        main()
        sys.stdout.flush()
    except RunPaused as pause:
        sys.exit(pause.exit_code)
    except UserError as error:
        _end(error)
    except BrokenPipeError:  # the reader of our output (head, less) closed it
        _discard_output()
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if is_lost_connection(error):
            _end(PeerLost())
        if "Too many open files" in str(error):
            _end(UserError("this process reached its limit of open files (ulimit -n); raise it (ulimit -n 4096), or "
                           "lower --workers", every_process=False))
        if memory := memory_that_ran_out(error):
            _end(RunStopped(f"{memory}; {less_memory}, and start the same command again", every_process=False))
        if isinstance(error, OSError) and error.filename and error.errno in OF_A_NAME:
            name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename)
            name = name if len(name) <= SHOWN else f"{name[:SHOWN]}..."
            _end(UserError(f"{name} cannot be opened ({error.strerror}); give another path, or make this one readable "
                           "and writable", every_process=False))
        if isinstance(error, OSError) and not _can_print():
            _discard_output()
            _end(UserError(f"the output could not be written ({error.strerror or error}); send it where there is room"))
        _tell_launcher(str(error), traceback.format_exc())
        raise


def without_codes(text: str) -> str:
    """``text``, which may have several lines, with control codes replaced."""
    return CODES.sub("?", text)


def one_line(text: str) -> str:
    """``text``, such as a file name, with line ends and control codes replaced; bytes that are not UTF-8 stay."""
    return re.sub("[\n\r\t]", "?", without_codes(text))


def _write_plain(write: Callable[[str], int], fold: Callable[[str], str], text: str) -> int:
    return write(fold(without_codes(text)))


def _prepare_streams() -> None:
    """Open closed streams (``>&-``) on /dev/null, so that no other file gets their descriptors; escape characters that
    the encoding lacks, replace control codes, and break long lines on a terminal."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w" if number else "r", encoding="utf-8")  # noqa: PTH123, SIM115 - for the life of the process
            setattr(sys, name, stream)
        if number and isinstance(stream, io.TextIOWrapper) and not isinstance(stream.write, functools.partial):
            stream.reconfigure(errors="backslashreplace")
            stream.write = functools.partial(_write_plain, stream.write, folded if stream.isatty() else str)


def _can_print() -> bool:
    """Whether stdout accepts a line; Python's own layers drop what they could not write."""
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except (OSError, ValueError):
        return False
    return True


def _discard_output() -> None:
    """Discard buffered output, which would fail again when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(error: UserError) -> None:
    if isinstance(error, PeerLost):
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            time.sleep(WAIT_FOR_LAUNCHER)  # its SIGTERM ends this process, which then does not count as failed
    else:
        _tell_launcher(f"error: {error}")
    if not error.every_process or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because a peer went away; gloo and NCCL raise no specific type for it."""
    words = ("closed by peer", "reset by peer", "Broken pipe", "Socket closed", "remote process exited",
             "communicator was aborted", "Connection refused")
    return (isinstance(error, RuntimeError) and os.environ.get("WORLD_SIZE", "1") != "1"
            and any(word in str(error) for word in words))


def memory_that_ran_out(error: BaseException) -> str:
    """For an out-of-memory exception, whose memory was too small, with its figures; '' for any other exception.

    PyTorch has a type only for its GPU allocator; errors of CUDA's libraries and of the host have none.
    """
    import torch  # slow, and not needed by those who import only the exceptions

    text = str(error)
    figures = ", ".join(said.format(found[1]) for pattern, said in (
        (r"[Tt]ried to allocate ([\d.]+ \w+)", "{} more were asked for"),
        (r"total capacity of ([\d.]+ \w+)", "it has {} in all")) if (found := re.search(pattern, text)))
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text):
        owner = "this machine's main memory"
    elif isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and any(
            words in text for words in ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"))):
        owner = "the GPU's memory"
    else:
        return ""
    return f"{owner} is too small" + (f" ({figures})" if figures else "")


def _tell_launcher(message: str, stack: str | None = None) -> None:
    """Write torchrun's error file (torch.distributed.elastic.multiprocessing.errors) if it asked for one."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": stack or message, "timestamp": str(int(time.time()))}
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:  # noqa: PTH123
        json.dump({"message": {"message": message, "extraInfo": extra}}, file)
