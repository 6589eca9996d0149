"""Throughput of a run, and the time it waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class Meter:
    """Images per second, and the share of time spent waiting for data, since the last reading."""

    def __init__(self, batches: Iterator[Tensor]) -> None:
        self._batches = batches
        self.restart()

    def restart(self) -> None:
        """Start a new measurement."""
        self._began, self._waited, self._paused, self._images = time.perf_counter(), 0.0, 0.0, 0

    def batches(self) -> Iterator[Tensor]:
        """The batches; the time spent waiting for them is measured."""
        while True:
            began = time.perf_counter()
            batch = next(self._batches, None)
            self._waited += time.perf_counter() - began
            if batch is None:
                return
            self._images += len(batch) // 2
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent inside, which is not training."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def read(self) -> tuple[float, float]:
        """Images per second and waiting share since the last reading."""
        elapsed = time.perf_counter() - self._began - self._paused
        rate, waiting = self._images / elapsed, self._waited / elapsed
        self.restart()
        return rate, waiting
