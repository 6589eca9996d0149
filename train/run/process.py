"""Process settings for hours of equal training steps: the C library's allocator and Python's garbage collector."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch

# Arguments of glibc's mallopt(3), for which Python has no names.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
KEPT_BYTES = 1 << 30  # larger blocks still return to the system when they are freed


def prepare_process(device: torch.device) -> None:
    """Prepare the process; to be called once, after everything long-lived was built and before the first step.

    On the CPU, freed memory stays with the process. A step frees all its activations and allocates as many again, and
    memory that has returned to the system comes back by page faults, zeroed. The resident memory therefore stays at the
    largest step's. (Other C libraries than glibc are left as they are.) Existing objects are hidden from Python's
    garbage collector, which would otherwise visit all of them several times a second.
    """
    if device.type == "cpu":
        _keep_freed_memory()
    gc.collect()
    gc.freeze()


def _keep_freed_memory() -> None:
    if sys.platform == "win32":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
