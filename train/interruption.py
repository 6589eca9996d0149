"""Ctrl-C and SIGTERM as requests that a loop honours between two steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Interruption:
    """Notes SIGINT and SIGTERM while it is entered; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._handlers: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> Interruption:
        self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
