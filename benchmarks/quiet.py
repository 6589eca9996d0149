"""Times of things to compare, on a machine that others use too.

One competing process can turn a second into ten, and clocks drift within minutes. So variants take turns in one
process, and every sample waits for a quiet moment.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

QUIET = 0.06  # share of all processors' time that others may use before a sample
WINDOW = 0.3  # seconds that they are watched for


def _processor_seconds() -> tuple[float, float]:
    """Jiffies that all processors were busy with anything, and jiffies in all. (0, 0) where Linux does not tell."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, idle, iowait, *others = map(int, file.readline().split()[1:9])
    except OSError:
        return 0, 0
    busy = user + nice + system + sum(others)  # interrupts, and what the host took from a virtual machine
    return busy, busy + idle + iowait


def foreign_load() -> float:
    """Share of all processors' time that others use, over the next WINDOW seconds, in which this process sleeps."""
    before = _processor_seconds()
    time.sleep(WINDOW)
    busy, total = (after - earlier for after, earlier in zip(_processor_seconds(), before, strict=True))
    return busy / total if total else 0.0


class Patience:
    """Waits for quiet moments, for `seconds` in all and `each` at a time at most."""

    def __init__(self, seconds: float, each: float) -> None:
        self._left, self._each = seconds, each

    def wait(self) -> None:
        """Return when others use less than QUIET of the machine, or when patience is at an end."""
        began = time.monotonic()
        while foreign_load() > QUIET and time.monotonic() - began < min(self._each, self._left):
            pass
        self._left -= time.monotonic() - began


def spread(seconds: Sequence[float]) -> float:
    """Half of the range between the quartiles, as a share of the median."""
    if len(seconds) < 2:
        return 0.0
    first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return (third - first) / 2 / median


def interleave(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    patience: Patience,
    tick: Callable[[str], None],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each variant in `rounds` rounds, each beginning with another one; `tick` gets its name before it."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for first in range(rounds):
        for index in range(len(names)):
            name = names[(first + index) % len(names)]
            tick(name)
            patience.wait()
            began = clock()
            variants[name]()
            seconds[name].append(clock() - began)
    return seconds
