"""NVIDIA's apex as the optional provider `apex`, for comparisons: chosen by name only."""

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ONLY_BY_NAME = "for comparisons: choose it with DSPNET_KERNELS=apex"
CHUNK = 65536  # elements per thread block, apex's default
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def installed() -> tuple[bool, str]:
    """Whether the package apex is NVIDIA's, found without importing it. Returns (True, "") or (False, reason)."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return False, "absent"
    if any(Path(folder, "multi_tensor_apply").is_dir() for folder in spec.submodule_search_locations or ()):
        return True, ""
    return False, "absent: the installed package apex is an unrelated web toolkit, not NVIDIA's"


@functools.cache
def supported() -> tuple[bool, str]:
    """Whether this machine can run apex's kernels. Returns (True, "") or (False, reason)."""
    found, reason = installed()
    if not found:
        return False, f"NVIDIA's apex is {reason}"
    if importlib.util.find_spec("amp_C") is None:
        return False, "NVIDIA's apex was built without its CUDA extensions: amp_C is missing"
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    return True, ""


def accepts(targets: Sequence[Tensor], onlines: Sequence[Tensor], tau: float) -> tuple[bool, str]:
    """Whether apex's axpby supports these arguments. Returns (True, "") or (False, reason)."""
    everything = [*targets, *onlines]
    if len({(tensor.dtype, tensor.device) for tensor in everything}) > 1:
        return False, "the tensors are of several dtypes or on several devices"
    if any(tensor.dtype not in DTYPES for tensor in everything):
        return False, f"the tensors are {everything[0].dtype}, not fp32, fp16 or bf16"
    if not all(tensor.is_contiguous() for tensor in everything):
        return False, "not all tensors are contiguous"
    return True, ""


def ema_update(targets: Sequence[Tensor], onlines: Sequence[Tensor], tau: float) -> None:
    """targets = tau * targets + (1 - tau) * onlines with amp_C.multi_tensor_axpby: a launch for hundreds of tensors."""
    pairs = [(target, online) for target, online in zip(targets, onlines, strict=True) if target.numel()]
    if not pairs:
        return
    of_targets, of_onlines = (list(tensors) for tensors in zip(*pairs, strict=True))
    overflow = torch.zeros(1, dtype=torch.int32, device=of_targets[0].device)  # set by infinite inputs, and ignored
    check_both = -1  # check both inputs for overflow
    lists = [of_targets, of_onlines, of_targets]
    with torch.cuda.device_of(of_targets[0]):
        importlib.import_module("amp_C").multi_tensor_axpby(CHUNK, overflow, lists, tau, 1 - tau, check_both)
