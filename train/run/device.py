"""The device of a command, and the settings of CUDA's libraries."""

import torch

from dspnet_fast.errors import InputError

from .options import DEVICES

BF16_CAPABILITY = (8, 0)
MAX_ELEMENTS = 2**31


def choose_device(name: str) -> torch.device:
    """Return the device for "auto" (CUDA or the CPU), "cpu", "cuda" or "mps"; raise InputError if it is absent."""
    if name not in DEVICES:
        raise InputError(f"--device must be one of {', '.join(DEVICES)}, not {name!r}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but PyTorch sees no CUDA device here: use --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        reason = "needs macOS 14 or later" if torch.backends.mps.is_built() else "is not in this build of PyTorch"
        raise InputError(f"--device mps, but Apple's GPU backend {reason}: use --device cpu")
    return torch.device(name)


def check_precision(precision: str, device: torch.device) -> None:
    """Raise InputError for a precision that was not tested on MPS, and for bf16 on a GPU without bf16 convolutions.

    PyTorch would compute the latter without cuDNN.
    """
    if precision != "fp32" and device.type == "mps":
        raise InputError(f"--precision {precision} was not tested on Apple's GPUs: use --precision fp32")
    if precision == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < BF16_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        raise InputError(
            f"--precision bf16, but {torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and "
            "cuDNN convolves bf16 from 8.0 (A100) on: use --precision fp16"
        )


def check_fast_kernels(device: torch.device) -> None:
    """Raise InputError for --fast-kernels on a device for which no operator has a fast provider."""
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--fast-kernels: no operator has a kernel for {device.type}; leave the option out")


def check_activations(per_image: int, images: int, micro_batches: int = 1) -> None:
    """Check that activations have less than 2^31 elements: cuDNN refuses larger ones in channels-last memory.

    Args:
        per_image: elements of the largest activation of an image.
        images: images that a pass computes, of all micro-batches of a rank.
        micro_batches: --grad-accum-steps.

    Raises:
        InputError: if a micro-batch is too large.
    """
    if images // micro_batches * per_image < MAX_ELEMENTS:
        return
    enough = (n for n in range(micro_batches, images + 1) if images % n == 0 and images // n * per_image < MAX_ELEMENTS)
    raise InputError(
        f"an activation of {images // micro_batches} images has {images // micro_batches * per_image:.2g} elements, "
        f"and cuDNN takes less than 2^31: use --grad-accum-steps {next(enough, images)}, or more GPUs"
    )


def configure_cuda(tf32: bool, cudnn: str = "deterministic") -> None:
    """Set the precision of fp32 products and the choice of convolution algorithms.

    Args:
        tf32: compute fp32 convolutions and products in tf32, otherwise in full.
        cudnn: --cudnn, see config.py. "default" is PyTorch's: a heuristic may choose algorithms whose sums have no
            fixed order. "benchmark" chooses by time, so two runs may choose differently.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.deterministic = cudnn == "deterministic"
    torch.backends.cudnn.benchmark = cudnn == "benchmark"
