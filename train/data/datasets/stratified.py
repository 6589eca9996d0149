"""Fixed stratified subsets of a labelled dataset, for semi-supervised evaluation."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dspnet_fast.errors import InputError

from ..sampler import mix
from .images import ImageDataset

SEED = 0  # of the published subsets


def stratified_subset(labels: Tensor, share: float, seed: int = SEED) -> list[int]:
    """Choose the same fraction of the images of every class.

    The images of a class are ranked by `mix(seed, c, k)`, where c is the class and k the position of the image within
    it, and the first ones are chosen. So the subset is the same on every machine, and a smaller subset is contained in
    a larger one.

    Args:
        labels: int64 [N].
        share: fraction of the images of each class, 0 to 1; rounded, but at least one image.
        seed: of the ranking.

    Returns:
        Ascending indices.

    Raises:
        InputError: the share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise InputError(f"a share of {share:%} of the images: give more than 0 and at most 100 percent")
    chosen: list[int] = []
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label).flatten().tolist()
        ranked = sorted(range(len(members)), key=lambda k: mix(seed, label, k))
        chosen += [members[k] for k in ranked[: max(1, int(share * len(members) + 0.5))]]
    return sorted(chosen)


def index_text(indices: Sequence[int]) -> str:
    """Return the indices as text, one per line."""
    return "".join(f"{i}\n" for i in indices)


def checksum(indices: Sequence[int]) -> str:
    """Return the SHA-256 of `index_text`."""
    return hashlib.sha256(index_text(indices).encode()).hexdigest()


def listed_subsets(images: ImageDataset, files: Sequence[str]) -> dict[float, list[int]]:
    """Subsets given by lists, such as SimCLR's of 1 and 10 percent of ImageNet.

    Args:
        images: training images.
        files: text files with the name of an image per line; folders before the name are ignored.

    Returns:
        Ascending indices by percentage of the images.

    Raises:
        InputError: a list cannot be read, is empty, or names an image that is not among `images`.
    """
    by_name = {os.path.basename(images.file(i)): i for i in range(len(images))}
    if len(by_name) < len(images):
        raise InputError(
            f"images of {images.name} in different folders have equal names: lists of names need unique ones"
        )
    subsets = {}
    for file in files:
        try:
            lines = Path(file).read_text("utf-8-sig", errors="surrogateescape").splitlines()
            names = [os.path.basename(line) for line in map(str.strip, lines) if line]
        except OSError as error:
            raise InputError(f"cannot read the list {file}: {error.strerror}") from error
        unknown = next((name for name in names if name not in by_name), None)
        if not names or unknown is not None:
            reason = "is empty" if not names else f"names {unknown}, which is not in {images.name}"
            raise InputError(f"the list {file} {reason}")
        indices = sorted({by_name[name] for name in names})
        subsets[round(100 * len(indices) / len(images), 2)] = indices
    return subsets
