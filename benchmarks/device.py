"""Device, precision and clock of the operator benchmarks.

DSPNET_BENCH_DEVICE: cpu (default) or cuda. DSPNET_BENCH_DTYPE: dtype of activations, fp32 (default), tf32 or bf16;
weights are fp32. tf32 lets all variants, cuDNN included, round operands of fp32 products to tf32; fp32 lets none.
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

TRIALS = 4  # algorithms that cuDNN times per convolution, of which a step has hundreds
WARM_UP = 3  # untimed calls, in which kernels are compiled and libraries choose algorithms
CALLS = 20  # largest number of calls per graph; several, because events are accurate to microseconds only
SAMPLE = 5e-3  # approximate seconds between two events
ROUNDS = 5, 30  # smallest and largest number of samples


@dataclass(frozen=True)
class Times:
    """Seconds of one call in each sample; `captured`: calls were replayed as a CUDA graph, without launch overhead."""

    seconds: list[float]
    captured: bool


def configure(ours: bool, tried: bool = False) -> None:
    """Configure cuDNN and fp32 products.

    Args:
        ours: deterministic convolutions, as train/run/device.py sets them; otherwise any algorithm.
        tried: let cuDNN time several algorithms and use the fastest.
    """
    torch.set_float32_matmul_precision("high" if PRECISION == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = PRECISION == "tf32"
    torch.backends.cudnn.benchmark = tried
    torch.backends.cudnn.benchmark_limit = TRIALS
    torch.backends.cudnn.deterministic = ours


def gpu_times(run: Callable[[], object], budget: float) -> Times:
    """Time `run` on the GPU for about `budget` seconds.

    Several calls are captured as a CUDA graph and replayed between two events. Calls that cannot be captured are
    launched instead.
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
    if not _synchronises(run):  # a failed capture leaves torch's random number generator unusable
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                several()
            again = graph.replay
        except RuntimeError:
            torch.cuda.synchronize()  # raises if the GPU itself is broken
    once = max(between_events(again) for _ in range(2))
    rounds = min(max(int(budget / max(once, 1e-6)), ROUNDS[0]), ROUNDS[1])
    return Times([between_events(again) / calls for _ in range(rounds)], again is not several)


def _synchronises(run: Callable[[], object]) -> bool:
    """Whether a call synchronises with the GPU, which a graph cannot contain."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def between_events(run: Callable[[], object]) -> float:
    """Seconds between two events around `run`: the GPU's work, or the launches if they take longer."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    run()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3


def is_broken() -> bool:
    """Whether this process can no longer use the GPU, as after an illegal access or a failed capture."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.rand(1, device="cuda")
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def name() -> str:
    """Name of the device and the precision."""
    if ON_GPU:
        return f"{torch.cuda.get_device_name()}, {PRECISION}"
    return f"{torch.get_num_threads()} threads, {PRECISION}"
