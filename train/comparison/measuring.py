"""Time and peak memory of the parts of a training step, measured in a separate process.

The timed step has the configuration, threads and operators of a run, and random images. It is divided as in
`pretraining/cuda_graphs.py`: the target's forward pass (with the normalisation of the batch), the forward and backward
pass of every subnet, and the update; besides, the teacher's features of the batch, if there is a teacher. The steps of
real runs are therefore free of timers, and on CUDA the graphs that they replay are timed. Data loading is excluded;
runs record how long they wait for it.

Peak memory is measured over a few whole steps: on CUDA torch's allocations; on the CPU the growth of the process's peak
resident memory (VmHWM) since before the networks were built. VmHWM, unlike getrusage, excludes the parent process.
"""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from dspnet_fast.ops import registry
from dspnet_fast.workers import Worker, receive

from ..config import PretrainConfig
from ..pretraining.cuda_graphs import StepGraphs
from ..pretraining.dspnet import VIEWS
from ..pretraining.trainer import Trainer, random_batch
from ..run.device import choose_device
from ..run.process import prepare_process
from ..selection.kernels import Kernels
from ..selection.selection import key_of
from ..teachers.live import LiveFeatures
from ..teachers.targets import TeacherTargets, random_targets
from ..teachers.teacher import open_teacher

WARM_UP = 2  # untimed steps
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class StepMeasurement:
    """Time and memory of one step.

    Attributes:
        target: median time of the target's forward pass, in seconds.
        online: median time of each subnet's forward and backward pass, in seconds.
        optimizer: median time of the update, in seconds.
        peak_memory: bytes; None on a CPU outside Linux.
        teacher: median time of the teacher's forward pass, in seconds; 0 without a teacher or with its features cached.
    """

    target: float
    online: dict[str, float]
    optimizer: float
    peak_memory: int | None
    teacher: float = 0.0


@dataclass(frozen=True)
class Job:
    """Steps to time: their configuration and number, their kernels, and without these the policy of the parent."""

    config: PretrainConfig
    steps: int
    kernels: Kernels | None
    policy: str


def measure_step(config: PretrainConfig, steps: int, kernels: Kernels | None = None) -> StepMeasurement:
    """Measure a training step in a new process.

    Args:
        config: configuration of the run.
        steps: number of timed steps.
        kernels: kernels of the step; by default those of this process.

    Raises:
        RuntimeError: if the process ends without a result.
    """
    job = Job(config, steps, kernels, registry.get_policy())
    with Worker(__name__, job, choose_device(config.device), config.plugins) as worker:
        result = worker.read(threading.TIMEOUT_MAX)
        if result is None:
            raise RuntimeError(f"a training step could not be timed: {worker.failure()}")
    return StepMeasurement(**result)


def main() -> None:
    """Measure the step of a job."""
    job, device, report = receive()
    if job.kernels is None:
        registry.set_policy(job.policy)
    else:
        config = job.config
        job.kernels.apply(key_of(device, config.tf32, config.plugins, config.cudnn))
    report(**asdict(measure_in_this_process(job.config, job.steps)))


def measure_in_this_process(config: PretrainConfig, steps: int) -> StepMeasurement:
    """Measure a step in this process; peak memory is correct only if no larger work ran here before."""
    device = choose_device(config.device)
    views = VIEWS * config.batch_size
    batch = random_batch(config, views)
    before = _peak_memory(device)
    # full_only_epochs=0: every subnet is trained from the first step on
    trainer = Trainer(replace(config, full_only_epochs=0), epoch_steps=WARM_UP, device=device)
    live = config.teacher is not None and config.teacher_cache is None
    trainer.teacher = _live_targets(config, device) if live else random_targets(config, device)
    prepare_process(device)
    for _ in range(WARM_UP):
        trainer.train_step(batch)
    after = _peak_memory(device)
    peak = None if before is None or after is None else after - before
    seconds = _time(trainer, batch, steps)
    names = trainer.model.family.names
    target, *online, optimizer, teacher = seconds
    return StepMeasurement(target, dict(zip(names, online, strict=True)), optimizer, peak, teacher if live else 0.0)


def _live_targets(config: PretrainConfig, device: torch.device) -> TeacherTargets:
    teacher = open_teacher(config, device)
    assert teacher is not None
    graphs = device.type == "cuda" and not config.no_cuda_graphs
    return TeacherTargets(LiveFeatures(teacher, device, graphs=graphs))


def _time(trainer: Trainer, batch: torch.Tensor, steps: int) -> list[float]:
    """Median times of the target, of each subnet, of the update and of the teacher's targets, in seconds."""
    device = trainer.device
    captures = device.type == "cuda" and not trainer.config.no_cuda_graphs
    alpha = torch.ones((), device=device)
    trainer.schedule(trainer.step)
    teacher = trainer.teacher or (lambda step, batch: None)
    capture = None if captures else list
    graphs = StepGraphs(trainer.model, trainer.flat_buffers, batch, alpha, capture, teacher(0, batch))
    pieces = [graphs.target, *graphs.subnets.values(), trainer.update, partial(teacher, 0, batch)]
    taken: list[list[float]] = [[] for _ in pieces]
    for _ in range(WARM_UP + steps):
        for piece, times in zip(pieces, taken, strict=True):
            began = _now(device)
            piece()
            times.append(_now(device) - began)
    return [statistics.median(times[WARM_UP:]) for times in taken]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_memory(device: torch.device) -> int | None:
    """Peak memory so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not STATUS.exists():
        return None
    kibibytes = next(line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(kibibytes)


if __name__ == "__main__":
    main()
