"""A Python that starts in a moment: forked from one that has imported torch and the project and used none of it.

``warm_python()`` is the path of a command that stands in for ``sys.executable``: a script, -m or -c, with the caller's
arguments, variables, folder, streams and other open files, in a process of its own, which gets the caller's signals and
whose end is the caller's. To import torch takes longer than most of what the tests run.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = ("torch", "torchvision", "torch.distributed.run", "tensorboard.summary", "train_distill", "train_teacher",
            "compute_knn", "evaluate", "inspect_checkpoint", "pack_dataset", "export", "helpers.small")
SHARED = "COSS_TEST_PYTHON"
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def warm_python():
    """Path of the command. The first call starts the process that is forked, for this process and those that it
    starts; it ends with this one."""
    if SHARED in os.environ:
        return os.environ[SHARED]
    folder = tempfile.TemporaryDirectory(prefix="warm-python-")
    address, command = f"{folder.name}/address", Path(folder.name, "python")
    command.write_text(f"#!{sys.executable} -IS\nimport runpy, sys\nsys.argv[:1] = ['ask', {address!r}]\n"
                       f"runpy.run_path({__file__!r}, run_name='__main__')\n")
    command.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, "serve", address, str(command)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, cwd=ROOT)
    assert server.stdout.readline() == b"ready\n"
    server.stdout.close()

    def end():
        server.stdin.close()
        server.wait()
        folder.cleanup()

    atexit.register(end)
    os.environ[SHARED] = str(command)
    return str(command)


# ---- the command


def ask(address, words):
    """Have ``words`` run, and end as they do."""
    files = [int(entry.name) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(address)
        request = json.dumps({"words": words, "cwd": str(Path.cwd()), "environment": dict(os.environ),
                              "files": files}).encode()
        socket.send_fds(line, [len(request).to_bytes(8, "big")], files)
        line.sendall(request)
        answers = line.makefile()
        process = int(answers.readline())
        for number in HANDED_ON:
            signal.signal(number, lambda number, _: os.kill(process, number))
        code = int(answers.readline() or -signal.SIGKILL)  # which the end of the server means
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


# ---- the process that is forked


def serve(address, command):
    """Fork for each caller until standard input is closed; a caller that is gone takes its process along."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)  # callers may come and wait
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # so that what is shared stays shared
    events, running = selectors.DefaultSelector(), {}
    events.register(listener, selectors.EVENT_READ)
    events.register(0, selectors.EVENT_READ)
    while True:
        for key, _ in events.select():
            if key.fileobj is listener:
                line, _ = listener.accept()
                request, files = received(line)
                process = os.fork()
                if not process:
                    listener.close()
                    _exit_of(become, command, request, files)
                for file in files:
                    os.close(file)
                line.sendall(b"%d\n" % process)
                ended = os.pidfd_open(process)
                running[ended] = running[line] = process, line, ended
                events.register(ended, selectors.EVENT_READ)
                events.register(line, selectors.EVENT_READ)
            elif key.fileobj == 0:
                for process, _, _ in running.values():
                    os.kill(process, signal.SIGKILL)
                return
            elif key.fileobj in running:
                process, line, ended = running[key.fileobj]
                if key.fileobj is line:  # the caller is gone
                    os.kill(process, signal.SIGKILL)
                code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                for each in (line, ended):
                    events.unregister(each)
                    del running[each]
                os.close(ended)
                with contextlib.suppress(BrokenPipeError):
                    line.sendall(b"%d\n" % code)
                line.close()


def received(line):
    size, files, _, _ = socket.recv_fds(line, 8, 64)
    return json.loads(line.makefile("rb").read(int.from_bytes(size, "big"))), files


def _exit_of(function, *arguments):
    """End this process as an interpreter does after ``function``, but for taking apart what was imported."""
    code = 0
    try:
        function(*arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if stop.code is not None and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, OSError):
            stream.flush()
    os._exit(code & 255)


def become(command, request, files):
    """What a fresh interpreter would find and do."""
    above = [fcntl.fcntl(file, fcntl.F_DUPFD, 256) for file in files]  # out of the way of the caller's numbers
    for file in files:
        os.close(file)
    for file, number in zip(above, request["files"], strict=True):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
    at_once = bool(os.environ.get("PYTHONUNBUFFERED")) or "-u" in request["words"][:2]
    sys.stdin = open(0, encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding=encoding, errors=errors or "strict", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stdout.reconfigure(write_through=at_once)
    sys.executable = command
    words = [word for word in request["words"] if word not in ("-u", "-B")]
    installed = [folder for folder in sys.path if folder.startswith((sys.prefix, sys.base_prefix))]
    given = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = ["", *given, *installed]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        sys.modules.pop(words[1], None)  # imported in advance, which runpy would remark on
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
    else:
        ask(sys.argv[1], sys.argv[2:])
