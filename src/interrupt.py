"""Signals that end a training: the first lets a step end and save, the second ends at once."""

from __future__ import annotations

import signal
import threading
from typing import Any

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupted(KeyboardInterrupt):
    """A signal ended the program. The exit code is 130 for SIGINT, 143 for the others."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.exit_code = 130 if number == signal.SIGINT else 143


class Signals:
    """Handlers of SIGTERM, SIGINT and SIGUSR1, as a context.

    The first signal raises Interrupted, or is only recorded in `received` once `is_deferred` is
    set. The second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.received = 0  # number of the signal
        self.is_deferred = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._handle) for number in HANDLED}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: Any) -> None:
        for handled in HANDLED:
            signal.signal(handled, signal.SIG_DFL)
        self.received = number
        if not self.is_deferred:
            raise Interrupted(number, "nothing was trained yet")
