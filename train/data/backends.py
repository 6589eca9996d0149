"""The backends that make batches of views, and which one a run uses. DALI is imported only if it is the one."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterable

import torch
from PIL import Image

from dspnet_fast.errors import InputError

from ..config import BACKENDS, Workers
from .bad_images import BadImages
from .datasets.images import ImageSet
from .loader import two_view_batches, worker_count
from .sampler import EpochSampler
from .views.augmentation import ViewSpec

SAMPLED = 16  # images that `auto` looks at
PHOTOGRAPH = 128  # pixels; JPEGs whose smaller side has as many are what DALI is for


def choose_backend(name: str, images: ImageSet, device: torch.device) -> str:
    """The backend that `name` asks for; InputError if it cannot run here.

    "auto" is dali-cpu for JPEG photographs where DALI is installed, and torchvision otherwise.
    """
    if name not in ("auto", *BACKENDS):
        raise InputError(f"a data backend is auto, {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}, not {name!r}")
    installed = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if name == "auto":
        return "dali-cpu" if installed and _photographs(images) else "torchvision"
    if name.startswith("dali") and not installed:
        raise InputError(
            f"--data-backend {name} needs NVIDIA DALI: pip install 'dspnet-fast[dali]', or nvidia-dali-cuda120 for "
            "CUDA 12; or use --data-backend torchvision"
        )
    if name == "dali-gpu" and device.type != "cuda":
        raise InputError(f"--data-backend dali-gpu needs a CUDA device, not {device}: use --data-backend dali-cpu")
    return name


def _photographs(images: ImageSet) -> bool:
    """Whether most of a few images, spread over the set, are JPEGs of photographs' size."""
    found = 0
    looked_at = range(0, len(images), -(-len(images) // SAMPLED))
    for i in looked_at:
        try:
            with Image.open(io.BytesIO(images.encoded(i))) as image:
                found += image.format == "JPEG" and min(image.size) >= PHOTOGRAPH
        except Exception:  # whatever is wrong with it, it is no photograph; who loads it will say so
            continue
    return 2 * found > len(looked_at)


def open_batches(
    backend: str,
    images: ImageSet,
    views: tuple[ViewSpec, ViewSpec],
    order: EpochSampler,
    workers: Workers,
    bad: BadImages,
    device: torch.device,
) -> Iterable[torch.Tensor]:
    """Batches of all of `order`: first view of all B images, then second view of all.

    From torchvision and dali-cpu they are bytes on the CPU, uint8 [2B, 1 or 3, S, S]; from dali-gpu float32
    [2B, 3, S, S] in channels-last memory on `device`, normalised. `workers` are processes of torchvision's, and threads
    of DALI's. InputError for one bad image too many.
    """
    if backend == "torchvision":
        return two_view_batches(images, views, order, workers, bad)
    from .views.dali_backend import TwoViews

    gpu = device if backend == "dali-gpu" else None
    return TwoViews(images, views, order, max(1, worker_count(workers, len(images))), bad, gpu)
