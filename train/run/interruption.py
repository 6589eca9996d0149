"""Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP as requests to stop between two steps."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

NAMES = "SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"  # Windows lacks the last two
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
AGAIN_SECONDS = 0.1
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


def ctrl_c_again(failure: Any) -> None:
    """A `sys.unraisablehook`: Ctrl-C in a destructor or a callback, which cannot raise, is raised after it."""
    if isinstance(failure.exc_value, KeyboardInterrupt):
        later = threading.Timer(AGAIN_SECONDS, _thread.interrupt_main)  # at once it would end in this hook too
        later.daemon = True
        later.start()
    else:
        sys.__unraisablehook__(failure)


@contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Hold Ctrl-C back in the body: processes that are forked there start without it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
