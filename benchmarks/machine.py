"""Measured limits of this machine: copy bandwidth and peak arithmetic, for roofline fractions."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from .device import DEVICE, DTYPE, ON_GPU, gpu_times

BEYOND_CACHES = 2**32  # bytes that a copy reads and writes to measure memory without caches


def _seconds(run: Callable[[], object], rounds: int) -> list[float]:
    if ON_GPU:
        return gpu_times(run, 0.03).seconds
    clock, seconds = cpu_clock(), []
    for _ in range(rounds + rounds // 3):
        began = clock()
        run()
        seconds.append(clock() - began)
    return seconds[-rounds:]


def cpu_clock() -> Callable[[], float]:
    """The clock of measurements on the CPU: processor time with one thread, which other processes disturb less."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


@functools.cache
def copy_bandwidth(footprint: int) -> float:
    """GB/s that a copy within `footprint` bytes reads and writes, the median of several.

    With the operator's footprint, the copy has the same cache hit rate as the operator.
    """
    source = torch.ones(max(1, footprint // 8), device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(_seconds(lambda: target.copy_(source), 15)) / 1e9


@functools.cache
def peak_gflops() -> float:
    """GFLOP/s in the activations' dtype: the largest of a large matrix product and convolutions.

    They use different libraries (MKL and oneDNN on x86), each of which is slow on some processors. PyTorch gives small
    batches of one thread to MKL. On a GPU cuDNN may compute 3 x 3 convolutions with less arithmetic than is counted.
    """
    side, channels, count = (8192, 1024, 8) if ON_GPU else (2048, 256, 32)
    left, right = (torch.randn(side, side, device=DEVICE, dtype=DTYPE) for _ in range(2))
    images = torch.randn(count, channels, 16, 16, device=DEVICE, dtype=DTYPE)
    images = images.to(memory_format=torch.channels_last)
    work: list[tuple[int, Callable[[], object]]] = [(2 * side**3, lambda: left @ right)]
    for kernel in (1,) if ON_GPU else (1, 3):
        weight = torch.randn(channels, channels, kernel, kernel, device=DEVICE, dtype=DTYPE)
        convolve = functools.partial(
            F.conv2d, images, weight.to(memory_format=torch.channels_last), padding=kernel // 2
        )
        work.append((2 * images.numel() * channels * kernel**2, convolve))
    return max(flops / min(_seconds(run, 9)) for flops, run in work) / 1e9


def roofline_seconds(flops: float, count: float, footprint: int) -> float:
    """Lower bound of the time: the larger of arithmetic time and memory time.

    Args:
        flops: number of floating-point operations.
        count: bytes read and written.
        footprint: bytes of the working set, see `copy_bandwidth`.
    """
    return max(flops / (1e9 * peak_gflops()), count / (1e9 * copy_bandwidth(footprint)))
