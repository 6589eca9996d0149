"""Which device a command uses."""

import torch

from dspnet_fast.errors import InputError


def choose_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda"; InputError for cuda where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but PyTorch sees no CUDA device here: use --device cpu")
    return torch.device(name)


def configure_cudnn() -> None:
    """Convolutions as exact as matrix products, and the same bits every time, which torch does not ask of cuDNN."""
    torch.backends.cudnn.allow_tf32 = torch.get_float32_matmul_precision() != "highest"
    torch.backends.cudnn.deterministic = True
