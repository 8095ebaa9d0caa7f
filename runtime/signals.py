"""Handles SIGTERM, SIGINT and SIGUSR1 between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

ANSWERED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Within this context, a stop signal is stored in ``asked`` instead of ending the process.

    Schedulers and torchrun send SIGTERM, SLURM can send SIGUSR1 some time before (``--signal``), and Ctrl-C is SIGINT.
    A second SIGINT ends the process at once, since the first one restores the system's handler. Only the main thread
    can have handlers; in other threads the context does nothing.
    """

    def __init__(self) -> None:
        self.asked = 0  # number of the first signal that came, 0 for none
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in ANSWERED}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def signal_name(number: int) -> str:
    """``SIGTERM`` for 15."""
    return signal.Signals(number).name
