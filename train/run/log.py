"""The log and the metrics of a run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dspnet_fast import atomic

from .trackers import open_trackers


class RunLog:
    """Writes lines to train.log, and metrics to metrics.jsonl and trackers.

    Args:
        out: the run directory.
        step: the step at which the run continues; metrics of later steps, written before an interruption, are dropped.
        trackers: names of trackers, see `trackers.open_trackers`.

    Raises:
        InputError: from every method, if the disk is full.
    """

    def __init__(self, out: Path, step: int, trackers: Sequence[str] = ("tensorboard",)) -> None:
        metrics = out / "metrics.jsonl"
        if metrics.exists():
            atomic.write_text(metrics, "".join(f"{line}\n" for line in _lines_until(metrics, step)))
        self._out = out
        with atomic.needs_room(out):
            self._metrics = open(metrics, "a", buffering=1)  # noqa: SIM115  (closed by close)
            # File names that are not UTF-8 are written with escapes.
            self._log = open(out / "train.log", "a", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            self._trackers = open_trackers(trackers, out, step)

    def line(self, text: str) -> None:
        """Append a line to train.log, preceded by the time."""
        with atomic.needs_room(self._out):
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Record the metrics of a step: numbers by name, or dictionaries of numbers by subnet."""
        with atomic.needs_room(self._out):
            self._metrics.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                scalars = value if isinstance(value, dict) else {"": value}
                for part, scalar in scalars.items():
                    for tracker in self._trackers:
                        tracker.scalar(f"{name}/{part}" if part else name, scalar, step)

    def sync(self) -> None:
        """Wait until the metrics are on the disk. Call it before saving a checkpoint, which must not precede them."""
        with atomic.needs_room(self._out):
            self._metrics.flush()
            os.fsync(self._metrics.fileno())

    def close(self) -> None:
        """Flush and close all files."""
        with atomic.needs_room(self._out), ExitStack() as each:  # closes all of them even if one fails
            for tracker in self._trackers:
                each.callback(tracker.close)
            for file in (self._metrics, self._log):
                each.callback(file.close)


def _lines_until(metrics: Path, step: int) -> list[str]:
    """Complete lines of steps up to `step`; a killed process can leave an incomplete one."""
    lines = []
    for line in metrics.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return lines


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """Return all recorded metrics of a run, in order."""
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def training_seconds(out: Path, batch_size: int) -> tuple[float, float]:
    """Seconds of training of a run, and how many of them it waited for data, from its metrics.

    Probes, checkpoints, and steps repeated after a crash are excluded.
    """
    total = waited = 0.0
    previous = 0
    for line in read_metrics(out):
        if "images_per_second" in line:
            seconds = (line["step"] - previous) * batch_size / line["images_per_second"]
            total += seconds
            waited += seconds * line["data_wait"]
            previous = line["step"]
    return total, waited
