"""How long a call takes on this machine."""

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
    """Milliseconds of one call: the median, what nine of ten calls stay within, and of how many calls."""

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
    """Time every subject, `rounds` times `calls` calls of it.

    A round takes all subjects in turn, so that what else the machine does falls on all of them; before the calls of a
    turn comes one that is not counted, so that nobody pays for what the one before left in the caches.

    Args:
        subjects: what to call, by name; each returns when its result is there.
        threads: of PyTorch while this measures, by default as many as it has now.
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
    """What a latency holds for, as JSON values."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "threads": threads or torch.get_num_threads(),
        "batch_size": batch_size,
        "image_size": image_size,
        "torch": torch.__version__,
    }
