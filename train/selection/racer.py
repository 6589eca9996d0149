"""The process that times the formulations: `python -m train.selection.racer`, started by selection.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from dspnet_fast.ops import registry
from dspnet_fast.verdicts import POLICIES
from dspnet_fast.workers import receive

from ..config import PretrainConfig
from ..pretraining.dspnet import VIEWS
from ..pretraining.trainer import Trainer, random_batch
from ..run.process import prepare_process
from ..teachers.targets import random_targets

CONTROL = "control"  # eager steps that are measured as if they were those of another formulation
SAMPLE_SECONDS = 0.05  # shortest time that is measured: several steps if one takes less
STEP_SECONDS = 1.5  # longest step of a race on a CPU, which has a smaller batch if necessary
FEWEST_IMAGES = 8  # of such a batch, if the run has more: otherwise the heads and the update would dominate
ROUNDS = 3, 15  # smallest and largest number of measurements
SEED_STEP = 1  # the step whose sampled subnets all steps of a race train


@dataclass(frozen=True)
class Job:
    """A race.

    Attributes:
        config: configuration of the steps, of one process.
        findings: providers to use and not to use, see `registry.use_findings`.
        seconds: time that the measurements may take.
    """

    config: PretrainConfig
    findings: dict[tuple[str, str], str]
    seconds: float


def main() -> None:
    """Time the steps of every formulation in turn and report the medians."""
    job, device, report = receive()
    registry.use_findings(job.findings)
    report(doing="building the networks")
    prepare_process(device)
    config, groups = job.config, job.config.bn_groups or 1
    steps = _first_steps(config, device, report)
    while steps is None and config.batch_size >= 4 * groups:
        config = replace(config, batch_size=config.batch_size // groups // 2 * groups)
        steps = _first_steps(config, device, report)
    if steps is None:
        report(failed="the device has too little memory for the steps of two formulations")
    else:
        report(result=steps.race(job.seconds, report))


def _first_steps(config: PretrainConfig, device: torch.device, report: Callable[..., None]) -> Steps | None:
    """The steps of a race, or None if they do not fit into the device's memory."""
    try:
        return Steps(config, device, report)
    except RuntimeError as error:
        if not isinstance(error.__cause__ or error, torch.OutOfMemoryError):  # the cause of a failed capture
            raise
        return None


class Steps:
    """Steps of every formulation on the same batch, after their first steps, which compile and capture.

    On a CPU the batch has fewer images than configured if an eager step would take more than STEP_SECONDS.

    Attributes:
        seconds: time of a step by formulation, of one measurement.
    """

    def __init__(self, config: PretrainConfig, device: torch.device, report: Callable[..., None]) -> None:
        self._device, self._config = device, config
        self._trainers = {name: Trainer(config, 1000, device) for name in POLICIES}
        for trainer in self._trainers.values():
            trainer.teacher = random_targets(config, device)
        self._images = config.batch_size
        if device.type == "cpu":
            groups = config.bn_groups or 1
            smallest = min(config.batch_size, max(2, FEWEST_IMAGES // groups) * groups)
            report(doing=f"an eager step of {smallest} images")
            self._draw(smallest)
            self.time("eager", 1)
            possible = int(STEP_SECONDS / self.time("eager", 1)) * smallest
            self._images = max(smallest, min(config.batch_size, possible // smallest * smallest))
        self._draw(self._images)
        self.seconds: dict[str, float] = {}
        for name in POLICIES:
            report(doing=f"first steps of {name}, {self._images} images")
            self.time(name, 1)
            self.seconds[name] = self.time(name, 1)

    def _draw(self, images: int) -> None:
        self._batch = random_batch(self._config, VIEWS * images)

    def time(self, name: str, steps: int) -> float:
        """Seconds per step of a formulation."""
        registry.set_policy(POLICIES[name])
        trainer = self._trainers[name]
        self._wait()
        began = time.perf_counter()
        for _ in range(steps):
            trainer.step = SEED_STEP
            trainer.train_step(self._batch)
        self._wait()
        return (time.perf_counter() - began) / steps

    def race(self, seconds: float, report: Callable[..., None]) -> dict[str, Any]:
        """Measure all formulations in alternation; the result has the fields of `dspnet_fast.verdicts.Race`."""
        names = [*POLICIES, CONTROL]
        times: dict[str, list[float]] = {name: [] for name in names}
        steps = max(1, round(SAMPLE_SECONDS / min(self.seconds.values())))
        least, most = ROUNDS
        began = time.monotonic()
        while len(times[CONTROL]) < most:
            done = len(times[CONTROL])
            if done >= least and (time.monotonic() - began) * (done + 1) / done > seconds:
                break
            medians = {name: statistics.median(found) for name, found in times.items() if found}
            report(doing=", ".join([f"round {done + 1}", *(f"{n} {1e3 * s:.0f} ms" for n, s in medians.items())]))
            for name in names if done % 2 else reversed(names):
                times[name].append(self.time("eager" if name == CONTROL else name, steps))
        medians = {name: statistics.median(found) for name, found in times.items()}
        control = medians.pop(CONTROL)
        return {"images": self._images, "seconds": medians, "control": control, "rounds": len(times[CONTROL])}

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


if __name__ == "__main__":
    main()
