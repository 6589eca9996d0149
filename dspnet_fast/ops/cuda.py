"""The CUDA library (csrc/cuda) as the provider `cuda`: loads it once, and gives the reason if it cannot be used."""

import functools
import json
from typing import Any

import torch

from . import cpp

LIBRARY = cpp.PACKAGE / "_C_cuda.so"
UNPROVEN = "not yet measured on a GPU: choose it with DSPNET_KERNELS=any or =cuda"


@functools.cache
def load() -> tuple[bool, str]:
    """Load the library after the CPU library, which defines its schemas. Returns (True, "") or (False, reason)."""
    loaded, reason = cpp.load()
    return cpp.load_into(LIBRARY, "the CUDA library") if loaded else (loaded, reason)


def built() -> str:
    """The architectures that the library was built for, or the reason why it was not built."""
    loaded, reason = load()
    return f"built for {json.loads(LIBRARY.with_suffix('.json').read_text())['architectures']}" if loaded else reason


@functools.cache
def supported() -> tuple[bool, str]:
    """Whether this machine can run the library. Returns (True, "") or (False, reason)."""
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    loaded, reason = load()
    if not loaded:
        return False, reason
    problem = torch.ops.dspnet_cpp.cuda_problem(torch.cuda.current_device())
    if problem:
        return False, f"the CUDA library, {built()}, does not run on {torch.cuda.get_device_name()}: {problem}"
    return True, ""


def has(operator: str) -> tuple[bool, str]:
    """Whether this machine can run the library and it contains the operator. Returns (True, "") or (False, reason)."""
    here, reason = supported()
    if here and not torch._C._dispatch_has_kernel_for_dispatch_key(f"dspnet_cpp::{operator}", "CUDA"):
        return False, "the CUDA library is older than this operator: install the project again"
    return here, reason


def serve(operator: Any, **options: Any) -> None:
    """Register the library's function with the operator's name as its provider `cuda`.

    options: as of Operator.provider; `unproven` is UNPROVEN by default.
    """

    options = {"supported": functools.partial(has, operator.name), "unproven": UNPROVEN} | options
    operator.provider("cuda", devices=("cuda",), **options)(cpp.caller(operator.name))
