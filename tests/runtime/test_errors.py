"""Exit codes and the one line on stderr."""

import pytest

from runtime.errors import RunStopped, UserError, run_script


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
