"""A signal is noted, a second Ctrl-C ends the process, and afterwards everything is as it was."""

import os
import signal
import threading

import pytest

from runtime.signals import ANSWERED, StopSignals, signal_name


@pytest.mark.parametrize("number", ANSWERED)
def test_the_first_signal_is_noted_and_handlers_come_back(number):
    before = [signal.getsignal(n) for n in ANSWERED]
    with StopSignals() as signals:
        assert signals.asked == 0
        os.kill(os.getpid(), number)
        assert signals.asked == number
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.asked == number
    assert [signal.getsignal(n) for n in ANSWERED] == before


def test_a_second_ctrl_c_ends_the_process_even_where_python_cannot_answer():
    pid = os.fork()
    if not pid:
        with StopSignals():
            os.kill(os.getpid(), signal.SIGINT)
            os.write(2, b"")
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGINT


def test_in_another_thread_it_does_nothing():
    before, found = signal.getsignal(signal.SIGTERM), []

    def enter():
        with StopSignals() as signals:
            found.append((signals.asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(0, before)]


def test_names():
    assert [signal_name(n) for n in ANSWERED] == ["SIGTERM", "SIGINT", "SIGUSR1"]
