"""The duration of a run, estimated from its first steps."""

from __future__ import annotations

import time
from collections.abc import Iterable
from statistics import median

import torch

from ..config import PretrainConfig
from ..costs.flops import TeacherCost, expected_steps, network_costs, run_cost
from ..run.tables import duration

TIMED = 3  # steps, after a first one that compiles, captures and allocates


class Duration:
    """Times steps and extrapolates by counted multiply-accumulates: steps of the warm-up train one network only.

    Args:
        config: configuration of the run.
        epoch_steps: steps per epoch.
        device: device of the run.
        teacher: cost of a teacher that computes every view.
    """

    def __init__(
        self, config: PretrainConfig, epoch_steps: int, device: torch.device, teacher: TeacherCost | None = None
    ) -> None:
        self._steps = config.epochs * epoch_steps
        self._first = config.full_only_steps(epoch_steps)
        self._description = f"{config.epochs:,} epochs, {self._steps:,} steps"
        self._device = device
        cost = run_cost(config, epoch_steps, network_costs(config), teacher)
        trained = expected_steps(config, epoch_steps)
        self._online = cost.online
        self._per_step = {name: cost.online[name] / max(1.0, steps) for name, steps in trained.items()}
        self._shared = (sum(cost.parts().values()) - sum(cost.online.values())) / self._steps
        self._full = list(trained)[-1]
        self._last = 0.0
        self._rates: list[float] = []  # seconds per multiply-accumulate

    def after_step(self, step: int, names: Iterable[str]) -> str | None:
        """Take the time.

        Args:
            step: number of steps done.
            names: networks that the step trained.

        Returns:
            A line with the estimated duration of the steps that are left after TIMED steps; otherwise None.
        """
        if len(self._rates) == TIMED:
            return None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now, last = time.perf_counter(), self._last
        self._last = now
        if not last:
            return None
        self._rates.append((now - last) / (self._shared + sum(self._per_step[name] for name in names)))
        if len(self._rates) < TIMED:
            return None
        return f"{self._description}: about {duration(median(self._rates) * self._left(step))} of training"

    def _left(self, step: int) -> float:
        """Expected multiply-accumulates of the steps after `step`."""
        left = self._steps - step
        small = sum(macs for name, macs in self._online.items() if name != self._full)
        later = (self._steps - max(step, self._first)) / max(1, self._steps - self._first)
        return left * (self._shared + self._per_step[self._full]) + small * max(0.0, later)
