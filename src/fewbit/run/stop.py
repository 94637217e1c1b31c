"""Stopping a run: SIGINT and SIGTERM let what is in flight finish, so that the same command goes on where it stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fewbit.base.errors import Interrupted


class Stop:
    """Whether a run is to stop, and by what signal; set by the system or by a worker that failed, asked for by every worker."""

    def __init__(self) -> None:
        self.signal: int = signal.SIGINT
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """
        Raises:
            Interrupted: FB-E0511 once a stop was asked for.
        """
        if self.is_set():
            error = Interrupted("FB-E0511", f"stopped by {signal.Signals(self.signal).name}; finished tensors are kept")
            error.exit_status = 128 + self.signal
            raise error

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """While this lasts a signal asks for a stop; a second one stops at once. Python hands signals to the main thread only: elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _frame: object) -> None:
        if self.is_set():
            raise KeyboardInterrupt
        self.signal = number
        self.set()
