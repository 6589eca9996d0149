"""The device of a command, and the settings of CUDA's libraries."""

import torch

from dspnet_fast.errors import InputError


def choose_device(name: str) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda"; raise InputError for "cuda" without a CUDA device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but PyTorch sees no CUDA device here: use --device cpu")
    return torch.device(name)


def configure_cuda(tf32: bool) -> None:
    """Make convolutions deterministic, which is not the default, and compute fp32 products in tf32 or in full."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.deterministic = True
