"""The views of masks that belong to the evaluation views of their images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ..run.options import Workers
from ..run.progress import Monitor
from .bad_images import Unreadable
from .datasets.masks import MaskedImages
from .loader import BatchDataset, make_loader, worker_count
from .views.torchvision_backend import evaluation_size

BATCH = 64


def mask_view(values: np.ndarray, image_size: int) -> Tensor:
    """Resize and crop a mask [H, W] like `torchvision_backend.evaluation_view`, by nearest pixels: int32 [S, S]."""
    size = evaluation_size(image_size, *values.shape)
    resized = F.resize(torch.from_numpy(values)[None], list(size), InterpolationMode.NEAREST_EXACT)
    return F.center_crop(resized, [image_size, image_size])[0]


def mask_views(masked: MaskedImages, image_size: int, name: str, workers: Workers = "auto") -> Tensor:
    """The views of all masks, with a progress bar.

    Args:
        masked: the images and masks.
        image_size: height and width S of the views in pixels.
        name: name of the work on the progress bar.
        workers: number of loader processes.

    Returns:
        int32 [N, S, S].

    Raises:
        InputError: a mask is none, or does not fit its image.
    """
    count = len(masked.images)
    batches = [range(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]
    views = []
    with Monitor(name, len(batches)) as monitor:
        for batch in make_loader(_Masks(masked, image_size), batches, worker_count(workers, count)):
            views.append(batch)
            monitor.advance()
    return torch.cat(views)


class _Masks(BatchDataset):
    def __init__(self, masked: MaskedImages, image_size: int) -> None:
        self._masked, self._image_size = masked, image_size

    def batch(self, items: Sequence[int], unreadable: list[Unreadable]) -> Tensor:
        return torch.stack([mask_view(self._masked.mask(i), self._image_size) for i in items])
