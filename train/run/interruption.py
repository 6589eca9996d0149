"""Ctrl-C, SIGTERM and SIGUSR1 as requests to stop between two steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, NoReturn

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


class Interruption:
    """A context manager that records these signals; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._first: signal.Signals | None = None  # None if another rank received the signal
        self._handlers: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self._first = signal.Signals(number)
        self.requested = True

    def stop(self) -> NoReturn:
        """End the program after saving.

        Raises KeyboardInterrupt after Ctrl-C, and SystemExit(0) after SIGTERM or SIGUSR1: clusters send these to
        preempt a job, which is no failure.
        """
        if self._first == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(0)

    def __enter__(self) -> Interruption:
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
