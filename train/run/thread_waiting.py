"""How the threads of a step wait for each other on a CPU: by spinning, or by sleeping while other processes are busy.

A thread that spins continues at once. Beside other busy processes it takes the time of the thread that it waits for.
PyTorch's threads are GNU OpenMP's, which spin for some milliseconds, but hardly at all while a process has more OpenMP
threads than cores. Further threads, which do nothing, therefore make all others sleep.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

INTERVAL = 1.0  # seconds between measurements
BUSY, QUIET = 0.05, 0.01  # shares of the time that a thread was ready and had no core
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # of GNU OpenMP; who sets them decides
GRAIN = 1 << 15  # elements that PyTorch gives to a thread at least


def waited_seconds() -> float:
    """Seconds that the threads of this process were ready and had no core, added up."""
    nanoseconds = 0
    for statistics in Path("/proc/self/task").glob("*/schedstat"):
        try:
            nanoseconds += int(statistics.read_text().split()[1])
        except OSError:  # the thread has ended
            continue
    return nanoseconds / 1e9


class ThreadWaiting:
    """Lets threads sleep instead of spin while other processes use the cores; a context.

    Elsewhere than on Linux, with one thread, and where GNU OpenMP's settings are in the environment, nothing is done.

    Args:
        waited: returns `waited_seconds`.
        clock: returns seconds.

    Example:
        with ThreadWaiting() as waiting:
            for batch in batches:
                step(batch)
                waiting.after_step()
    """

    def __init__(
        self, waited: Callable[[], float] = waited_seconds, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._threads = torch.get_num_threads()
        self._adapts = sys.platform == "linux" and self._threads > 1 and not any(key in os.environ for key in SETTINGS)
        self._waited, self._clock = waited, clock
        self._last = (clock(), waited()) if self._adapts else (0.0, 0.0)
        self._pools: list[tuple[threading.Thread, threading.Event]] = []

    @property
    def sleeps(self) -> bool:
        """Whether threads that wait sleep at once."""
        return bool(self._pools)

    def after_step(self) -> None:
        """Measure and adapt, at most once in INTERVAL."""
        if not self._adapts or (now := self._clock()) - self._last[0] < INTERVAL:
            return
        before, self._last = self._last, (now, self._waited())
        share = (self._last[1] - before[1]) / (now - before[0]) / self._threads
        if share > BUSY and not self.sleeps:
            self._add_threads()
        elif share < QUIET:
            self._end_threads()

    def _add_threads(self) -> None:
        """Start as many pools of threads as it takes to have more threads than cores."""
        missing = len(os.sched_getaffinity(0)) - self._threads + 1
        for _ in range(max(1, -(-missing // (self._threads - 1)))):
            started, end = threading.Event(), threading.Event()
            pool = threading.Thread(target=_hold_pool, args=(self._threads, started, end), daemon=True)
            try:
                pool.start()
            except RuntimeError:  # the process may have no further thread: all go on spinning
                return
            started.wait()
            self._pools.append((pool, end))

    def _end_threads(self) -> None:
        for _, end in self._pools:
            end.set()
        for pool, _ in self._pools:
            pool.join()
        self._pools.clear()

    def __enter__(self) -> ThreadWaiting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_threads()


def _hold_pool(threads: int, started: threading.Event, end: threading.Event) -> None:
    """Have a pool of OpenMP threads, which belongs to the thread that first uses it, until `end`."""
    try:
        torch.empty(threads * GRAIN).fill_(0)
    finally:
        started.set()
    end.wait()
