"""What the parts of a training step take: seconds and peak memory, measured in a process of their own.

The timed step has the run's configuration, threads and operators, and noise for images. It is timed in the parts of
`pretraining/cuda_graphs.py`: the target (with the normalisation of the batch), every subnet's forward and backward
pass, and the update. Thus a run's own steps carry no timers, and on CUDA the graphs that a run replays are timed.
Loading data is not included: a run records how long it waits for it.

Peak memory is that of a few whole steps. On the CPU it is the growth of the process's resident memory since before the
networks were built (the kernel's VmHWM, which unlike getrusage's maximum forgets what the parent process had), on CUDA
what torch allocated.
"""

from __future__ import annotations

import multiprocessing
import signal
import statistics
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from dspnet_fast.ops import registry

from ..config import PretrainConfig
from ..pretraining.cuda_graphs import StepGraphs
from ..pretraining.dspnet import VIEWS
from ..pretraining.trainer import Trainer
from ..run.device import choose_device
from ..run.process import prepare_process

WARM_UP = 2
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Measured:
    """Of one step.

    Attributes:
        target, optimizer: medians, in seconds.
        online: the same for each subnet.
        peak_memory: bytes; None where the system does not tell (on the CPU, anywhere but on Linux).
    """

    target: float
    online: dict[str, float]
    optimizer: float
    peak_memory: int | None


def measure(config: PretrainConfig, steps: int) -> Measured:
    """Measure `steps` steps of a run in a new process; RuntimeError if that ends without a result."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, config, steps, torch.get_num_threads()))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        raise RuntimeError("the process that times a training step ended without a result: see above") from error
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()


def _answer(sender: Connection, config: PretrainConfig, steps: int, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    torch.set_num_threads(threads)
    if config.fast_kernels:
        registry.fast_kernels()
    sender.send(measure_here(config, steps))


def measure_here(config: PretrainConfig, steps: int) -> Measured:
    """What `measure` does, in this process: its peak memory is right only if nothing larger ran here before."""
    device = choose_device(config.device)
    views = VIEWS * config.batch_size
    batch = torch.randint(256, (views, 3, config.image_size, config.image_size), dtype=torch.uint8)
    before = _resident(device)
    # every network from the first step on
    trainer = Trainer(replace(config, full_only_epochs=0), epoch_steps=WARM_UP, device=device)
    prepare_process(device)
    for _ in range(WARM_UP):
        trainer.train_step(batch)
    after = _resident(device)
    peak = None if before is None or after is None else after - before
    seconds = _time(trainer, batch, steps)
    names = trainer.model.family.names
    return Measured(seconds[0], dict(zip(names, seconds[1:-1], strict=True)), seconds[-1], peak)


def _time(trainer: Trainer, batch: torch.Tensor, steps: int) -> list[float]:
    """Median seconds of the target, of each subnet and of the update."""
    device = trainer.device
    captures = device.type == "cuda" and not trainer.config.no_cuda_graphs
    alpha = torch.ones((), device=device)
    trainer.flat_buffers.schedule(trainer.learning_rate(trainer.step), trainer.tau(trainer.step))
    graphs = StepGraphs(trainer.model, trainer.flat_buffers, batch, alpha, None if captures else list)
    pieces = [graphs.target, *graphs.subnets.values(), trainer.update]
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


def _resident(device: torch.device) -> int | None:
    """The most memory there was so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not STATUS.exists():
        return None
    kibibytes = next(line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(kibibytes)
