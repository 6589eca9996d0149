"""Where operators are timed, in what, and by which clock: the CPU and fp32, unless the environment says otherwise.

DSPNET_BENCH_DEVICE: cpu or cuda. DSPNET_BENCH_DTYPE: bf16, fp32 or tf32, of activations; weights are fp32 in any case.
fp32 is exact for everybody, in tf32 everybody's products of fp32 may be rounded to tf32, also those of cuDNN.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

DEVICE = torch.device(os.environ.get("DSPNET_BENCH_DEVICE", "cpu"))
PRECISION = os.environ.get("DSPNET_BENCH_DTYPE", "fp32")
ON_GPU = DEVICE.type == "cuda"
DTYPE = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}[PRECISION]

TRIALS = 4  # algorithms, in the order that cuDNN thinks best: a step has hundreds of convolutions to try them on
WARM_UP = 3  # calls in which kernels are compiled and libraries choose algorithms
CALLS = 20  # in one recording, at most: an event is some microseconds off
SAMPLE = 5e-3  # seconds between two events, about
ROUNDS = 5, 30  # samples, at least and at most


@dataclass(frozen=True)
class Times:
    """Seconds of one call, by each sample. recorded: replayed as a graph, so that launches are not in them."""

    seconds: list[float]
    recorded: bool


def configure(ours: bool, tried: bool = False) -> None:
    """Libraries as ours (train/run/device.py), or the comparison, has them: its convolutions may have any algorithm,
    with `tried` the fastest of some on trial; ours are deterministic. Products of fp32 are the same for both."""
    torch.set_float32_matmul_precision("high" if PRECISION == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = PRECISION == "tf32"
    torch.backends.cudnn.benchmark = tried
    torch.backends.cudnn.benchmark_limit = TRIALS
    torch.backends.cudnn.deterministic = ours


def gpu_times(run: Callable[[], object], budget: float) -> Times:
    """Times of `run` on the GPU, for about `budget` seconds: several calls recorded as a graph, between two events.

    What cannot be recorded is launched as often.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    calls = min(CALLS, math.ceil(SAMPLE / max(between_events(run), SAMPLE / CALLS)))

    def several() -> None:
        for _ in range(calls):
            run()

    again: Callable[[], object] = several
    if not _waits(run):  # a recording that fails leaves torch's generator of random numbers unusable
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                several()
            again = graph.replay
        except RuntimeError:
            torch.cuda.synchronize()  # if that fails too, more than recording does
    once = max(between_events(again) for _ in range(2))
    rounds = min(max(int(budget / max(once, 1e-6)), ROUNDS[0]), ROUNDS[1])
    return Times([between_events(again) / calls for _ in range(rounds)], again is not several)


def _waits(run: Callable[[], object]) -> bool:
    """Whether it makes the host wait for the GPU, which cannot be recorded."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def between_events(run: Callable[[], object]) -> float:
    """Seconds that the GPU needs for what `run` asks of it, or `run` for asking."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    run()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3


def is_broken() -> bool:
    """Whether the GPU answers with nothing but errors from now on, as after an illegal access, or random numbers do, as
    after a recording that failed: a new process is needed."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.rand(1, device="cuda")
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def name() -> str:
    """What the times are of."""
    if ON_GPU:
        return f"{torch.cuda.get_device_name()}, {PRECISION}"
    return f"{torch.get_num_threads()} threads, {PRECISION}"
