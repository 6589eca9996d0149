"""Fixed subsets of a labelled set, the same share of every class: what semi-supervised evaluation may see labels of."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from dspnet_fast.errors import InputError

from ..sampler import mix

SEED = 0  # of the published subsets


def balanced_subset(labels: Tensor, share: float, seed: int = SEED) -> list[int]:
    """Indices, ascending, of a share (0 to 1) of the images of every class, rounded, but one at least.

    The k-th image of class c stands at the place that `mix(seed, c, k)` has among those of its class, and the first of
    them are taken. So the subset is a function of the labels' order and the seed on any machine, and a smaller share is
    part of a larger one. InputError for a share outside 0 to 1.
    """
    if not 0 < share <= 1:
        raise InputError(f"a share of {share:%} of the images: give more than 0 and at most 100 percent")
    chosen: list[int] = []
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label).flatten().tolist()
        ranked = sorted(range(len(members)), key=lambda k: mix(seed, label, k))
        chosen += [members[k] for k in ranked[: max(1, int(share * len(members) + 0.5))]]
    return sorted(chosen)


def as_text(indices: Sequence[int]) -> str:
    """One index a line."""
    return "".join(f"{i}\n" for i in indices)


def checksum(indices: Sequence[int]) -> str:
    """SHA-256 of `as_text`."""
    return hashlib.sha256(as_text(indices).encode()).hexdigest()
