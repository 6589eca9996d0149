"""Operators under `torch.autocast`: they get arguments in its dtype, as PyTorch's own operations do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CAST = (torch.float32, torch.float16, torch.bfloat16)  # as convolutions: all but float64
DISPATCH_KEYS = ("AutocastCPU", "AutocastCUDA")

# Found here, because torch.compile of PyTorch 2.11 cannot call is_autocast_available.
_DEVICES = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu")))
_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)


def is_autocasting(device: torch.device) -> bool:
    """Whether autocast is enabled for a device."""
    return device.type in _DEVICES and torch.is_autocast_enabled(device.type)


def disabled() -> Any:
    """A context in which the dispatcher does not autocast."""
    return torch._C._ExcludeDispatchKeyGuard(_KEYS)


def cast(args: tuple[Any, ...], places: Sequence[int], device: str | None) -> tuple[Any, ...]:
    """The arguments of a call on a device type, those at `places` in the dtype of autocast if it is enabled there."""
    if not places or device is None or not is_autocasting(torch.device(device)):
        return args
    result = list(args)
    for place in places:
        if isinstance(result[place], Tensor) and result[place].dtype in CAST:
            result[place] = result[place].to(torch.get_autocast_dtype(device))
    return tuple(result)
