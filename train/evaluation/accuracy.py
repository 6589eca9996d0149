"""Top-1 and top-5 accuracies with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dspnet_fast.errors import InputError
from dspnet_fast.machine import in_float64


@dataclass(frozen=True)
class Accuracy:
    """Accuracies of a classifier, from 0 to 1.

    Attributes:
        top1: fraction of images whose class has the highest score.
        top5: fraction of images whose class is among the five highest scores.
        interval: half-width of the 95 % interval of `top1`.
    """

    top1: float
    top5: float
    interval: float


def interval95(accuracy: float, n: int) -> float:
    """Half-width of Wilson's 95 % interval of an accuracy.

    Unlike that of the normal approximation, it is not 0 for accuracies of 0 and 1 (Wilson 1927; Brown, Cai & DasGupta
    2001).

    Args:
        accuracy: accuracy from 0 to 1.
        n: number of images it was measured on.
    """
    z = 1.959964
    return z / (1 + z * z / n) * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))


@torch.no_grad()
def accuracies(batches: Iterable[tuple[Mapping[str, Tensor], Tensor]]) -> dict[str, Accuracy]:
    """Accuracies of several networks on the same images.

    Args:
        batches: logits [B, C] by network, and labels [B] on the same device. With fewer than five classes, `top5` is 1.

    Returns:
        Accuracies by network.

    Raises:
        InputError: if there are no images.
    """
    correct: dict[str, Tensor] = {}
    n = 0
    for logits, labels in batches:
        n += len(labels)
        for name, scores in logits.items():
            hits = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
            counts = torch.stack([hits[:, 0].sum(), hits.sum()])
            correct[name] = correct[name] + counts if name in correct else counts
    if n == 0:
        raise InputError("no test images to classify: the test split is empty")
    fractions = {name: (in_float64(counts) / n).tolist() for name, counts in correct.items()}
    return {name: Accuracy(top1, top5, interval95(top1, n)) for name, (top1, top5) in fractions.items()}
