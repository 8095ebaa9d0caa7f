"""Exit codes and the one line on stderr."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import runtime.errors
from runtime.errors import PeerLost, RunPaused, RunStopped, UserError, is_lost_connection, run_script

ROOT = Path(__file__).resolve().parents[2]


def run(raised, capsys):
    def main():
        print("working")
        if raised is not None:
            raise raised

    try:
        run_script(main)
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


@pytest.mark.parametrize(("raised", "code", "err"), [
    (None, 0, ""),
    (UserError("--data x was not found; give y"), 2, "error: --data x was not found; give y\n"),
    (RunStopped("the loss is not finite"), 3, "error: the loss is not finite\n"),
    (KeyboardInterrupt(), 130, ""),
    (RunPaused(), 75, ""),
    (PeerLost("a peer is gone"), 4, "error: a peer is gone\n"),
])
def test_exit_codes(raised, code, err, capsys):
    found, streams = run(raised, capsys)
    assert found == code
    assert streams.err == err
    assert streams.out == "working\n"


@pytest.mark.parametrize(("local_rank", "every_process", "lines"), [
    ("0", True, 1), ("0", False, 1), ("1", True, 0), ("1", False, 1), ("7", True, 0)])
def test_one_line_a_machine_for_what_every_process_meets(monkeypatch, capsys, local_rank, every_process, lines):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    code, streams = run(UserError("no", every_process), capsys)
    assert code == 2
    assert streams.err.count("\n") == lines


def test_what_is_nobodys_fault_but_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


@pytest.mark.parametrize(("name", "reason"), [
    ("x" * 300, "File name too long"), ("x/" * 3000, "File name too long"), ("a", "Permission denied"),
    ("loop", "Too many levels of symbolic links")])
def test_a_path_that_cannot_be_is_a_sentence(name, reason, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")

    def main():
        if name == "a":  # which root would be allowed
            raise PermissionError(errno.EACCES, reason, name)
        Path(name).stat()

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith(f"error: {name[:200]}")
    assert said.endswith(f" cannot be opened ({reason}); give another path, or make this one readable and writable\n")
    assert len(said) < 400


def test_a_pause_is_no_failure_that_torchrun_should_answer_by_starting_again(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert run(RunPaused(), capsys)[0] == 75
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert run(RunPaused(), capsys)[0] == 0


LOST = "[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:51234"


@pytest.mark.parametrize(("error", "processes", "lost"), [
    (RuntimeError(LOST), 2, True), (RuntimeError(LOST), 1, False), (RuntimeError("shapes do not fit"), 2, False),
    (ValueError(LOST), 2, False)])
def test_a_lost_connection_is_told_from_other_trouble(monkeypatch, error, processes, lost):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert is_lost_connection(error) is lost


def test_who_lost_a_peer_leaves_the_word_to_it(monkeypatch, capsys, tmp_path):
    slept = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(runtime.errors.time, "sleep", slept.append)
    code, streams = run(RuntimeError(LOST), capsys)
    assert code == 4
    assert streams.err.startswith("error: the connection to another process")
    assert "gloo" not in streams.err
    assert slept == [10.0]  # in which torchrun, which has seen the other die, ends this process
    assert not (tmp_path / "error.json").exists()


@pytest.mark.parametrize(("error", "words"), [(UserError("--data x was not found; give y"), "error: --data x was not"),
                                              (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero")])
def test_torchruns_report_begins_with_the_error(monkeypatch, capsys, tmp_path, error, words):
    """As torchrun itself reads the file."""
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    try:
        run(error, capsys)
    except ZeroDivisionError:
        assert "Traceback" in json.loads(path.read_text())["message"]["extraInfo"]["py_callstack"]
    failure = ProcessFailure(local_rank=1, pid=5, exitcode=1, error_file=str(path))
    assert words in failure.message["extraInfo"]["py_callstack"]
    assert failure.timestamp > 1_700_000_000


SAID = ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.2 GiB is "
        "free.")


@pytest.mark.parametrize(("error", "said"), [
    (torch.OutOfMemoryError(SAID), ["the GPU's memory", "2.00 GiB more", "79.10 GiB in all"]),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), ["the GPU's memory is too small; "]),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ["the GPU's memory"]),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                  "to allocate 4096000000 bytes. Error code 12"), ["main memory", "4096000000 bytes more"]),
    (MemoryError(), ["main memory is too small; "]),
])
def test_memory_that_ran_out_is_one_sentence_with_what_to_do(error, said, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main, less_memory="give --micro-batch")
    err = capsys.readouterr().err
    assert stop.value.code == 3
    assert err.count("\n") == 1
    assert all(words in err for words in [*said, "give --micro-batch, and start the same command again"])


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1", "cp437", "utf-8"])
def test_output_never_fails_for_its_letters(encoding):
    """A terminal of another encoding, and a file name that no encoding has."""
    program = "from runtime.errors import run_script; run_script(lambda: print('a \u2026 \\udcff \u20ac b'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": encoding},
                          capture_output=True, timeout=180)
    said = "a \u2026 \\udcff \u20ac b" if encoding == "utf-8" else "a \\u2026 \\udcff \\u20ac b"
    assert (done.returncode, done.stdout.decode("utf-8"), done.stderr) == (0, said + "\n", b"")


def test_codes_that_a_terminal_obeys_are_not_written():
    """They may stand in the names of files, classes and tensors; progress bars step up by one of them."""
    program = ("import sys; from runtime.errors import run_script\n"
               "def main():\n"
               "    for file in (sys.stdout, sys.stderr):\n"
               "        print('a\\x1b[31m\\x07\\x9b\\u202eb\\tc', file=file)\n"
               "    sys.stdout.write('\\r\\x1b[Ad\\n')\n"
               "run_script(main)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "utf-8"},
                          capture_output=True, timeout=60)
    assert done.stdout.decode() == "a?[31m???b\tc\n\r\x1b[Ad\n"
    assert done.stderr.decode() == "a?[31m???b\tc\n"


PRINTS = """
import sys
from runtime.errors import run_script

def main():
    with open(sys.argv[1], "w") as file:
        assert file.fileno() > 2
        for number in range(20_000):
            print("line", number)
        file.write("all of it")
    print("a last word", file=sys.stderr)

run_script(main)
"""


@pytest.mark.parametrize(("where", "code", "err"), [
    (">&-", 0, "a last word\n"), (">&- 2>&-", 0, ""), ("<&- >&- 2>&-", 0, ""),
    ("> /dev/full", 2, "error: the output could not be written (No space left on device); send it where there is "
                       "room\n")])
def test_a_screen_that_is_closed_or_full(tmp_path, where, code, err):
    (tmp_path / "prints.py").write_text(PRINTS)
    done = subprocess.run(["bash", "-c", f'exec "$0" prints.py out.txt {where}', sys.executable], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (code, err, "")
    assert ((tmp_path / "out.txt").read_text() == "all of it") == (code == 0)


def test_a_reader_that_goes_away_after_a_line(tmp_path):
    (tmp_path / "prints.py").write_text(PRINTS)
    done = subprocess.run(["bash", "-c", '"$0" prints.py out.txt | head -1; echo "${PIPESTATUS[0]}"', sys.executable],
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("line 0\n1\n", "")


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"),
                                   RuntimeError("Too many open files. Communication with the workers is no longer")])
def test_too_many_open_files_is_one_sentence(error, capsys):
    code, streams = run(error, capsys)
    assert code == 2
    assert "ulimit -n 4096" in streams.err
    assert streams.err.count("\n") == 1


START = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python starts, but for a job in a shell's background
sys.path.insert(0, {root!r})
if True:
    from runtime.start import begin
    begin("none.py")
import os, resource, signal
os.kill(os.getpid(), signal.SIGINT)
"""


def test_ctrl_c_during_imports_shows_no_traceback():
    done = subprocess.run([sys.executable, "-c", START.format(root=str(ROOT))], capture_output=True, text=True,
                          timeout=180)
    assert (done.returncode, done.stderr) == (-2, "")


def test_a_limit_of_open_files_under_which_nothing_works():
    done = subprocess.run(["bash", "-c", f"ulimit -n 20; exec {sys.executable} inspect_checkpoint.py x.pth"], cwd=ROOT,
                          capture_output=True, text=True, timeout=180)
    assert done.returncode == 2
    assert done.stderr.startswith("error: this process may have 20 files open at once (ulimit -n)")
    assert done.stderr.count("\n") == 1


def test_every_root_script_begins_before_its_imports():
    for path in ROOT.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "run_script(main" in text:
            assert text.index("    begin(__file__)\n") < text.index("\nimport "), path.name
