"""Choose a data backend and open its batches. DALI is imported only if it is chosen."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterable

import torch
from PIL import Image

from dspnet_fast.errors import InputError

from ..config import BACKENDS
from ..run.options import Workers
from .bad_images import BadImages
from .datasets.images import ImageDataset
from .loader import two_view_batches, worker_count
from .sampler import EpochSampler
from .views.augmentation import ViewSpec

SAMPLED = 16  # images that `auto` inspects
MIN_PHOTOGRAPH_SIZE = 128  # pixels of the shorter side from which on `auto` prefers DALI for JPEGs


def choose_backend(name: str, images: ImageDataset, device: torch.device, eight_bit: bool = True) -> str:
    """Resolve the option --data-backend.

    Args:
        name: a backend or "auto", which is dali-cpu for JPEG photographs if DALI is installed, else torchvision.
        images: the dataset, inspected for "auto".
        device: the device of the training.
        eight_bit: whether images are read as 8-bit grey or RGB.

    Returns:
        One of `BACKENDS`.

    Raises:
        InputError: the name is unknown or the backend cannot run here.
    """
    if name not in ("auto", *BACKENDS):
        raise InputError(f"unknown data backend {name!r}: give auto, {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}")
    installed = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if not eight_bit:
        if name.startswith("dali"):
            raise InputError(
                f"--data-backend {name} reads 8-bit grey and RGB images, normalised as ImageNet's: use --data-backend "
                "torchvision for others"
            )
        return "torchvision"
    if name == "auto":
        return "dali-cpu" if installed and _mostly_photographs(images) else "torchvision"
    if name.startswith("dali") and not installed:
        raise InputError(
            f"--data-backend {name} needs NVIDIA DALI: pip install 'dspnet-fast[dali]', or nvidia-dali-cuda120 for "
            "CUDA 12; or use --data-backend torchvision"
        )
    if name == "dali-gpu" and device.type != "cuda":
        raise InputError(f"--data-backend dali-gpu needs a CUDA device, not {device}: use --data-backend dali-cpu")
    return name


def _mostly_photographs(images: ImageDataset) -> bool:
    """Whether more than half of a few evenly spaced images are JPEGs of at least MIN_PHOTOGRAPH_SIZE."""
    found = 0
    inspected = range(0, len(images), -(-len(images) // SAMPLED))
    for i in inspected:
        try:
            with Image.open(io.BytesIO(images.encoded(i))) as image:
                found += image.format == "JPEG" and min(image.size) >= MIN_PHOTOGRAPH_SIZE
        except Exception:  # reported when the image is loaded
            continue
    return 2 * found > len(inspected)


def open_batches(
    backend: str,
    images: ImageDataset,
    views: tuple[ViewSpec, ViewSpec],
    sampler: EpochSampler,
    workers: Workers,
    bad: BadImages,
    device: torch.device,
) -> Iterable[torch.Tensor]:
    """Return an iterable of batches: the first view of all B images, then the second view of all.

    Args:
        backend: one of `BACKENDS`.
        images: the dataset.
        views: the distributions of the two views.
        sampler: yields the (epoch, index) pairs of each batch.
        workers: processes of torchvision, or threads of DALI.
        bad: counts images that cannot be read; each is replaced by the next readable one.
        device: where dali-gpu computes.

    Returns:
        From torchvision and dali-cpu uint8 [2B, 1 or 3, S, S] on the CPU, or normalised float32 [2B, C, S, S] of images
        that are not 8-bit; from dali-gpu normalised float32 [2B, 3, S, S] on `device`, in channels-last memory.

    Raises:
        InputError: while iterating, if more images are unreadable than `bad` allows.
    """
    if backend == "torchvision":
        return two_view_batches(images, views, sampler, workers, bad)
    from .views.dali_backend import DaliLoader

    gpu = device if backend == "dali-gpu" else None
    return DaliLoader(images, views, sampler, max(1, worker_count(workers, len(images))), bad, gpu)
