"""Mean intersection over union (IoU) of predicted and true classes of pixels, with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.datasets.masks import UNKNOWN

RESAMPLES = 1000


@dataclass(frozen=True)
class Overlap:
    """Overlap of predictions and targets, from 0 to 1.

    Attributes:
        mean_iou: mean IoU of the classes that occur in the targets.
        interval: half-width of its 95 % interval: between quantiles of resampled test images.
        pixel_accuracy: fraction of pixels whose class is right.
        iou: IoU by class; None for classes that do not occur.
    """

    mean_iou: float
    interval: float
    pixel_accuracy: float
    iou: dict[str, float | None]


def pixel_counts(predicted: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Count the pixels of each class.

    Args:
        predicted: classes, int64 [B, H, W].
        targets: classes, or UNKNOWN, uint8 [B, H, W].
        classes: number of classes.

    Returns:
        int64 [B, 3, classes]: pixels of each image that have the class in both, in the prediction, and in the target.
    """
    image = torch.arange(len(targets), device=targets.device).view(-1, 1, 1)
    pair = (image * classes + targets) * classes + predicted
    flat = torch.bincount(pair[targets != UNKNOWN], minlength=len(targets) * classes * classes)
    joint = flat.view(-1, classes, classes)
    return torch.stack([joint.diagonal(dim1=1, dim2=2), joint.sum(1), joint.sum(2)], dim=1)


def overlap(counts: Tensor, names: Sequence[str]) -> Overlap:
    """The overlap of predictions with targets.

    Args:
        counts: of all test images, [N, 3, classes], see `pixel_counts`.
        names: names of the classes.
    """
    counts = counts.cpu().double()
    total = counts.sum(0)
    drawn = torch.randint(len(counts), (RESAMPLES, len(counts)), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
    resampled = _mean_iou((times @ counts.flatten(1)).view(-1, *total.shape))
    low, high = torch.nanquantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    both, predicted, actual = total
    iou = both / (predicted + actual - both)
    by_class = {
        name: found if known else None for name, found, known in zip(names, iou.tolist(), actual > 0, strict=True)
    }
    return Overlap(_mean_iou(total).item(), (high - low) / 2, (both.sum() / actual.sum()).item(), by_class)


def _mean_iou(total: Tensor) -> Tensor:
    """Mean IoU of counts [..., 3, classes], of the classes in the targets."""
    both, predicted, actual = total.unbind(-2)
    iou = torch.where(actual > 0, both / (predicted + actual - both), 0)
    return iou.sum(-1) / (actual > 0).sum(-1)
