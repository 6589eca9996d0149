"""What a process that repeats one step for hours asks of the C library and of Python."""

from __future__ import annotations

import ctypes
import gc

import torch

# glibc, mallopt(3). Python has no name for them.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
KEPT = 1 << 30  # bytes; a larger block still goes back to the system when it is freed


def prepare_process(device: torch.device) -> None:
    """To be called once, when all that lasts is built and the steps begin.

    On the CPU, freed memory stays with the process: a step frees all its activations and asks for as many again, and
    memory that went back to the system returns page by page, each by a fault, and zeroed. So the resident memory stays
    what the largest step needed. (With a C library other than glibc nothing changes.) What is built by now is put out
    of sight of Python's garbage collector, which otherwise looks through all of it several times a second.
    """
    if device.type == "cpu":
        _keep_freed_memory()
    gc.collect()
    gc.freeze()


def _keep_freed_memory() -> None:
    process = ctypes.CDLL(None)
    if hasattr(process, "gnu_get_libc_version"):
        process.mallopt(M_MMAP_THRESHOLD, KEPT)
        process.mallopt(M_TRIM_THRESHOLD, KEPT)
