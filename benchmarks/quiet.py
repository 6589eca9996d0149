"""Timing of several variants on a shared machine.

Other processes can slow a sample down tenfold, and clock rates drift within minutes. Samples of the variants are
therefore interleaved in one process, and each waits until other processes are quiet.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

QUIET = 0.06  # fraction of all processors' time that other processes may use before a sample
WINDOW = 0.3  # seconds over which their load is measured


def _processor_seconds() -> tuple[float, float]:
    """Busy and total jiffies of all processors; (0, 0) without /proc/stat."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, idle, iowait, *others = map(int, file.readline().split()[1:9])
    except OSError:
        return 0, 0
    busy = user + nice + system + sum(others)  # interrupts, and time stolen by the host of a virtual machine
    return busy, busy + idle + iowait


def other_load() -> float:
    """Fraction of all processors' time that other processes use; sleeps for WINDOW seconds to measure it."""
    before = _processor_seconds()
    time.sleep(WINDOW)
    busy, total = (after - earlier for after, earlier in zip(_processor_seconds(), before, strict=True))
    return busy / total if total else 0.0


class QuietWait:
    """Waits until other processes are quiet, up to `seconds` in total and up to `each` per call."""

    def __init__(self, seconds: float, each: float) -> None:
        self._left, self._each = seconds, each

    def wait(self) -> None:
        """Return when the load of other processes is below QUIET, or at the time limit."""
        began = time.monotonic()
        while other_load() > QUIET and time.monotonic() - began < min(self._each, self._left):
            pass
        self._left -= time.monotonic() - began


def relative_half_iqr(seconds: Sequence[float]) -> float:
    """Half of the interquartile range, divided by the median."""
    if len(seconds) < 2:
        return 0.0
    first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return (third - first) / 2 / median


def shuffled(names: Iterable[str], number: int) -> list[str]:
    """The names in the order of a round, a random one: a sample depends on the memory that the one before has left."""
    order = list(names)
    random.Random(number).shuffle(order)
    return order


def interleave(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    quiet: QuietWait,
    tick: Callable[[str], None],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time variants in rounds of one sample each, in the order of `shuffled`.

    Args:
        variants: functions by name.
        rounds: number of samples of each variant.
        quiet: wait before each sample.
        tick: called with the name of the variant before each sample.
        clock: returns seconds.

    Returns:
        Seconds of all samples by variant.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in shuffled(variants, number):
            tick(name)
            quiet.wait()
            began = clock()
            variants[name]()
            seconds[name].append(clock() - began)
    return seconds
