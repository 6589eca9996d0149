"""Latency of function calls on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .machine import cpu_model

ROUNDS, CALLS = 3, 10


@dataclass(frozen=True)
class Latency:
    """Latency of one call.

    Attributes:
        median_ms: median, in milliseconds.
        p90_ms: 90th percentile, in milliseconds.
        calls: number of calls measured.
    """

    median_ms: float
    p90_ms: float
    calls: int


def measure(
    subjects: Mapping[str, Callable[[], object]],
    *,
    threads: int | None = None,
    rounds: int = ROUNDS,
    calls: int = CALLS,
) -> dict[str, Latency]:
    """Measure the latency of each subject over `rounds` x `calls` calls.

    Rounds alternate between subjects, so that other load on the machine affects all of them alike. One uncounted call
    before each group of calls warms the caches.

    Args:
        subjects: functions to call, by name; each must return after its result is complete.
        threads: PyTorch threads during the measurement; by default the current number.
        rounds: number of rounds.
        calls: calls per subject and round.

    Returns:
        The latency of each subject, by name.

    Example:
        >>> found = measure({"sort": lambda: torch.rand(100).sort()}, rounds=1, calls=5)
        >>> found["sort"].calls
        5
    """
    before = torch.get_num_threads()
    milliseconds: dict[str, list[float]] = {name: [] for name in subjects}
    try:
        torch.set_num_threads(threads or before)
        for _ in range(rounds):
            for name, call in subjects.items():
                call()
                for _ in range(calls):
                    began = time.perf_counter()
                    call()
                    milliseconds[name].append(1000 * (time.perf_counter() - began))
    finally:
        torch.set_num_threads(before)
    return {name: _summary(taken) for name, taken in milliseconds.items()}


def _summary(milliseconds: list[float]) -> Latency:
    ordered = sorted(milliseconds)
    return Latency(statistics.median(ordered), ordered[math.ceil(0.9 * len(ordered)) - 1], len(ordered))


def conditions(device: torch.device, threads: int | None, batch_size: int, image_size: int) -> dict[str, Any]:
    """The conditions of a latency measurement, as JSON values."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "threads": threads or torch.get_num_threads(),
        "batch_size": batch_size,
        "image_size": image_size,
        "torch": torch.__version__,
    }
