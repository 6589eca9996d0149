"""Accuracies and how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dspnet_fast.errors import InputError


@dataclass(frozen=True)
class Accuracy:
    """Shares from 0 to 1 of images whose class is the first guess, or among the first five; the half-width of the 95 %
    interval of the first."""

    top1: float
    top5: float
    interval: float


def interval95(accuracy: float, n: int) -> float:
    """Half the width of Wilson's 95 % interval of an accuracy (0 to 1) measured on n images.

    Unlike the normal approximation it does not shrink to nothing at 0 and 1 (Wilson 1927; Brown, Cai & DasGupta 2001).
    """
    z = 1.959964
    return z / (1 + z * z / n) * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))


@torch.no_grad()
def accuracies(batches: Iterable[tuple[Mapping[str, Tensor], Tensor]]) -> dict[str, Accuracy]:
    """The accuracy of every network, from batches of (logits [B, C] by network, labels [B] on the same device).

    Of fewer than five classes all count as the first five. InputError if there are no images.
    """
    right: dict[str, Tensor] = {}
    n = 0
    for logits, labels in batches:
        n += len(labels)
        for name, scores in logits.items():
            found = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
            counts = torch.stack([found[:, 0].sum(), found.sum()])
            right[name] = right[name] + counts if name in right else counts
    if n == 0:
        raise InputError("no test images to classify: give a test split with images")
    shares = {name: (counts.double() / n).tolist() for name, counts in right.items()}
    return {name: Accuracy(top1, top5, interval95(top1, n)) for name, (top1, top5) in shares.items()}
