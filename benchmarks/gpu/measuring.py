"""Time, memory and synchronisations of calls on a GPU, and their capture as CUDA graphs.

On the CPU, which stands in for a GPU to try the scripts, calls are not captured, and memory and synchronisations are 0.
"""

from __future__ import annotations

import gc
import time
import traceback
import warnings
from collections.abc import Callable, Sequence

import torch

from benchmarks import device
from benchmarks.device import DEVICE
from train.pretraining.cuda_graphs import capture_graphs

ON_GPU = DEVICE.type == "cuda"


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds between two events around a call."""
    if ON_GPU:
        return device.between_events(run)
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def capture(functions: Sequence[Callable[[], object]]) -> Sequence[Callable[[], object]]:
    """Replays of functions as CUDA graphs, see `capture_graphs`."""
    return capture_graphs(functions) if ON_GPU else functions


def count_syncs(step: Callable[[], object]) -> int:
    """Number of synchronisations of a call with the GPU."""
    if not ON_GPU:
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def first_sync(step: Callable[[], object]) -> str:
    """Traceback of the first synchronisation."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError:
        return traceback.format_exc()[-2000:]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "not reproduced"


def reserved_memory() -> int:
    """Bytes that the allocator reserves after freeing its cache."""
    if not ON_GPU:
        return 0
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def peak_of(step: Callable[[], object]) -> int:
    """Peak bytes that the allocator reserves during a step.

    Reserved, not allocated: private memory of graphs counts as free between replays.
    """
    if not ON_GPU:
        return 0
    reserved_memory()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved()


def retries() -> int:
    """Number of times that the allocator freed its cache to allocate."""
    return torch.cuda.memory_stats().get("num_alloc_retries", 0) if ON_GPU else 0
