"""Signals that end a stage: the first lets it save, the second ends it at once."""

from __future__ import annotations

import signal
import threading
from typing import Any

# A terminal that closes sends SIGHUP; batch systems send the others.
HANDLED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)


class Interrupted(KeyboardInterrupt):
    """A signal ended the program. The exit code is 130 for SIGINT, 143 for the others."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.exit_code = 130 if number == signal.SIGINT else 143


class Signals:
    """Handlers of the signals in HANDLED, as a context.

    The first signal raises Interrupted(message), or is only recorded in `received` once
    `is_deferred` is set. The second signal ends the process at once. SIGHUP stays ignored under
    nohup.
    """

    def __init__(self, message: str = "nothing was trained yet") -> None:
        self.message = message
        self.received = 0  # number of the signal
        self.is_deferred = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: Any) -> None:
        for handled in self.previous:
            signal.signal(handled, signal.SIG_DFL)
        self.received = number
        if not self.is_deferred:
            raise Interrupted(number, self.message)
