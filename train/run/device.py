"""The device of a command, and the settings of cuDNN."""

import torch

from dspnet_fast.errors import InputError


def choose_device(name: str) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda"; raise InputError for "cuda" without a CUDA device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but PyTorch sees no CUDA device here: use --device cpu")
    return torch.device(name)


def configure_cudnn() -> None:
    """Make convolutions deterministic, and as precise as torch.set_float32_matmul_precision asks; not the defaults."""
    torch.backends.cudnn.allow_tf32 = torch.get_float32_matmul_precision() != "highest"
    torch.backends.cudnn.deterministic = True
