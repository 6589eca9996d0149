"""Times of things to compare, on a machine that others use too.

One competing process can turn a second into ten, and clocks drift within minutes. So variants take turns in one
process, every sample waits for a quiet moment, and those that were pushed off a processor do not count.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

QUIET = 0.06  # share of all processors' time that others may use before a sample
WINDOW = 0.3  # seconds that they are watched for
SWITCHES = 20  # involuntary ones per second that a sample may see: two processes on one CPU switch a few hundred times
ENOUGH = 2  # undisturbed samples, to leave the others out


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


@dataclass
class Samples:
    """Seconds of one variant, and those of disturbed samples."""

    seconds: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)

    @property
    def counted(self) -> list[float]:
        """Undisturbed samples; all of them if fewer than ENOUGH were."""
        return self.seconds if len(self.seconds) >= ENOUGH else self.seconds + self.disturbed

    @property
    def median(self) -> float:
        """Of those that count."""
        return statistics.median(self.counted)

    @property
    def spread(self) -> float:
        """Half of the range between the quartiles, as a share of the median."""
        if len(self.counted) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.counted, n=4, method="inclusive")
        return (third - first) / 2 / self.median

    def add(self, run: Callable[[], object]) -> None:
        """Take one."""
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - switches
        (self.disturbed if switches > 3 + SWITCHES * seconds else self.seconds).append(seconds)


def interleave(
    variants: Mapping[str, Callable[[], object]], rounds: int, patience: Patience, tick: Callable[[str], None]
) -> dict[str, Samples]:
    """Take turns for `rounds` rounds, each beginning with another variant; `tick` is told the variant before each."""
    samples = {name: Samples() for name in variants}
    names = list(variants)
    for first in range(rounds):
        for index in range(len(names)):
            name = names[(first + index) % len(names)]
            tick(name)
            patience.wait()
            samples[name].add(variants[name])
    return samples
