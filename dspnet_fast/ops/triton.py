"""Triton kernels (kernels/) as the provider `triton`. Triton is imported when a kernel is first needed.

With TRITON_INTERPRET=1 Triton interprets kernels in Python, for tests and debugging; then they run on the CPU as well,
very slowly, and only if chosen by name.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
UNPROVEN = "not yet measured on a GPU: choose it with DSPNET_KERNELS=any or =triton"
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)


@functools.cache
def supported() -> tuple[bool, str]:
    """Whether this machine can run the kernels. Returns (True, "") or (False, reason)."""
    if not INTERPRETED:
        if not torch.cuda.is_available():
            return False, "no CUDA device"
        if torch.cuda.get_device_capability() < (8, 0):
            return False, f"{torch.cuda.get_device_name()} is older than compute capability 8.0, which Triton needs"
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed"
    if importlib.util.find_spec("dspnet_fast.kernels") is None:
        return False, "dspnet_fast.kernels is missing: install the project (pip install -e . --no-build-isolation)"
    return True, ""


@functools.cache
def kernels(operator: str) -> ModuleType:
    """The module of an operator's kernels, which are installed as dspnet_fast.kernels (see ROOTS in setup.py)."""
    return importlib.import_module(f"dspnet_fast.kernels.{operator}")


def serve(operator: Any, accepts: Sequence[str] = (), without: Sequence[str] = (), **options: Any) -> None:
    """Register the launcher with the operator's name as its provider `triton`, after the operator's checks.

    Args:
        operator: the operator.
        accepts: names of the arguments of the module's function `accepts`; empty for all.
        without: the operator's parameters that the launcher does not have.
        options: as of Operator.provider; `unproven` is UNPROVEN by default.
    """
    module = operator.name.removesuffix("_backward")
    accepted = [operator.parameters.index(name) for name in accepts or operator.parameters]
    kept = [place for place, name in enumerate(operator.parameters) if name not in without]

    def run_accepts(*args: Any) -> tuple[bool, str]:
        return kernels(module).accepts(*map(args.__getitem__, accepted))

    def run(*args: Any) -> Any:
        operator.check(*args)
        return getattr(kernels(module), operator.name)(*map(args.__getitem__, kept))

    options = {"unproven": UNPROVEN} | options
    operator.provider("triton", devices=DEVICES, supported=supported, accepts=run_accepts, **options)(run)
