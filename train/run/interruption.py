"""Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP as requests to stop between two steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, NoReturn

NAMES = "SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"  # Windows lacks the last two
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
# What Ctrl-C leaves, and how to go on.
CONTINUES = "the same command continues from what was saved"
NOTHING = "nothing was written: start again"


def ctrl_c_kills() -> None:
    """Let Ctrl-C end the process at once, without a traceback, unless it is ignored or handled otherwise."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def ctrl_c_raises() -> None:
    """Undo `ctrl_c_kills`: Ctrl-C raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Interruption:
    """A context manager that records these signals; a second SIGINT interrupts at once.

    SIGHUP, sent when a terminal is closed, stays ignored in a process that `nohup` started.
    """

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

        Raises KeyboardInterrupt after Ctrl-C, and SystemExit(0) after the other signals: clusters send these to
        preempt a job, which is no failure.
        """
        if self._first == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(0)

    def __enter__(self) -> Interruption:
        recorded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._note) for number in recorded}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
