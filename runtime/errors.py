"""The one exception that is meant for people, how a run ends, and the wrapper that says so to the caller."""

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

EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_LOST, EXIT_PAUSED = 2, 3, 4, 75  # 75 is sysexits' EX_TEMPFAIL: try again
# What a terminal obeys, or turns around, but for line ends, tabs and the step up that progress bars take.
CODES = re.compile("(?!\x1b\\[A)[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
OF_A_NAME = {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EROFS}  # which a path that is given has
SHOWN = 200  # letters of a path
WAIT_FOR_LAUNCHER = 10.0  # seconds that a process whose peer is gone leaves to torchrun, which names the one that died


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


class Damaged(Exception):
    """A file that is not as it was written; the message says in what way, and whoever reads the file what to do."""


class RunStopped(UserError):
    """A run that cannot go on (a loss that is not finite, no memory left), said in one sentence."""

    exit_code = EXIT_STOPPED


class NotFinite(UserError):
    """Features that hold NaN or infinity: of a file's network, where the message says what to look at, or of one that
    is being trained, where ``found`` alone holds."""

    def __init__(self, found: str, advice: str, every_process: bool = True) -> None:
        super().__init__(f"{found}; {advice}", every_process)
        self.found = printable(found)

    def __reduce__(self) -> tuple[type, tuple[str, str, bool]]:
        return type(self), (self.found, str(self).removeprefix(f"{self.found}; "), self.every_process)


class PeerLost(UserError):
    """Another process of the job is gone, so this one cannot go on; its own error is said elsewhere."""

    exit_code = EXIT_LOST

    def __init__(self, message: str = "the connection to another process of this job broke, so this one ends too; what "
                 "happened is said by that process or by torchrun's report; start the same command again to go on from "
                 "the last checkpoint", every_process: bool = True) -> None:
        super().__init__(message, every_process)


class RunPaused(Exception):
    """A run that a signal ended after its checkpoint was written: started again, it goes on.

    The exit code is 75; but 0 under ``torchrun --max-restarts N``, which takes any other for a failure and would
    start the processes again.
    """

    @property
    def exit_code(self) -> int:
        return EXIT_PAUSED if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0" else 0


def run_script(main: Callable[[], None], *, less_memory: str = "lower --batch-size") -> None:
    r"""Run a root script's ``main``; turn a :class:`UserError` into one line on stderr and its exit code.

    ``less_memory`` is what to do where memory runs out, which is told in one line too. Under torchrun the error is also
    written to the file from which its report is made, so that the rank that failed first stands at the top of it.
    Output never fails for its letters: those that a terminal does not have are written as \u2026. Nor does it hold
    codes that a terminal obeys, which the names of files, classes and tensors may have.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # until here, see runtime.start
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _prepare_streams()
    try:
        main()
        sys.stdout.flush()
    except RunPaused as pause:
        sys.exit(pause.exit_code)
    except UserError as error:
        _end(error)
    except BrokenPipeError:  # the reader of our output (head, less) went away
        _discard_output()
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if is_lost_connection(error):
            _end(PeerLost())
        if "Too many open files" in str(error):
            _end(UserError("this process has as many files open as it may (ulimit -n); start it with more (ulimit -n "
                           "4096), or lower --workers", every_process=False))
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
    """``text`` of several lines without the codes that a terminal obeys."""
    return CODES.sub("?", text)


def one_line(text: str) -> str:
    """``text``, the name of a file say, without line ends and the codes that a terminal obeys; bytes that are not UTF-8
    stay."""
    return re.sub("[\n\r\t]", "?", without_codes(text))


def _write_plain(write: Callable[[str], int], text: str) -> int:
    return write(without_codes(text))


def _prepare_streams() -> None:
    """Streams that were closed (``>&-``) lead nowhere, so that no other file gets their numbers; letters never fail,
    and no terminal gets codes."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w" if number else "r", encoding="utf-8")  # noqa: PTH123, SIM115 - for the life of the process
            setattr(sys, name, stream)
        if number and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            stream.write = functools.partial(_write_plain, stream.write)


def _can_print() -> bool:
    """Whether stdout takes a line; Python's own layers forget what they could not write."""
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except (OSError, ValueError):
        return False
    return True


def _discard_output() -> None:
    """What still waits to be printed goes nowhere, where the end of the process would fail once more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(error: UserError) -> None:
    if isinstance(error, PeerLost):
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            time.sleep(WAIT_FOR_LAUNCHER)  # its SIGTERM ends this process, which then has failed in nobody's eyes
    else:
        _tell_launcher(f"error: {error}")
    if not error.every_process or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because a peer went away; what gloo and NCCL say has no type of its own."""
    words = ("closed by peer", "reset by peer", "Broken pipe", "Socket closed", "remote process exited",
             "communicator was aborted", "Connection refused")
    return (isinstance(error, RuntimeError) and os.environ.get("WORLD_SIZE", "1") != "1"
            and any(word in str(error) for word in words))


def memory_that_ran_out(error: BaseException) -> str:
    """Whose memory an exception says was too small, with the figures that it gives; '' for any other exception.

    PyTorch has a type for its own allocator on a GPU alone; what CUDA's libraries and the host say has none.
    """
    import torch  # seconds, which those who import this module for its exceptions do not wait for

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
