"""Progress: a live bar on a terminal, and otherwise a plain line every PLAIN_SECONDS."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 15.0


class Monitor:
    """A context manager that shows the progress of a number of steps.

    Args:
        name: name of the work, such as "pretrain".
        steps: total number of steps.
        done: steps done before.
        console: where to print; by default stdout.
    """

    def __init__(self, name: str, steps: int, done: int = 0, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.steps, self.done, self._name = steps, done, name
        self._live: Progress | None = None
        self.restart()
        if self.console.is_terminal:
            self._live = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
                console=self.console,
            )
            self._task = self._live.add_task(name, total=steps, completed=done, status="")

    def restart(self) -> None:
        """Estimate the time left from now on, without the time spent before."""
        self._began = self._last_plain = time.monotonic()
        self._began_at = self.done

    def __enter__(self) -> Monitor:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hide the bar while another monitor is shown; exclude the time from the estimate."""
        if self._live:
            self._live.stop()
        yield
        if self._live:
            self._live.start()
        self.restart()

    def advance(self) -> None:
        """Count one more step."""
        self.done += 1
        if self._live:
            self._live.update(self._task, completed=self.done)

    def status(self, text: str) -> None:
        """Show a status text beside the progress."""
        now = time.monotonic()
        if self._live:
            self._live.update(self._task, status=text)
        elif now - self._last_plain >= PLAIN_SECONDS or self.done == self.steps:
            self._last_plain = now
            left = (now - self._began) / max(1, self.done - self._began_at) * (self.steps - self.done)
            self.line(f"{self._name} {self.done}/{self.steps}  {text}  {_duration(left)} left")

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
