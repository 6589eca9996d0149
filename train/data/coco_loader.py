"""Batches of COCO images with their boxes and masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from ..config import Workers
from .bad_images import BadImages, Refusal
from .datasets.coco import CocoSet, Instances
from .loader import Batches, make_loader, worker_count
from .sampler import EpochSampler, mix


def training_batches(images: CocoSet, order: EpochSampler, workers: Workers) -> Iterator[list[Instances]]:
    """All of `order`, each image flipped or not as (seed, epoch, image) says."""
    bad = BadImages()
    yield from make_loader(_Flipped(images, order.seed), order, worker_count(workers, len(images)), bad)


def evaluation_images(images: CocoSet, workers: Workers) -> Iterable[list[Instances]]:
    """The images in their order, one by one."""
    each = [[i] for i in range(len(images))]
    return make_loader(_AsTheyAre(images), each, worker_count(workers, len(images)), BadImages())


class _Flipped(Batches):
    def __init__(self, images: CocoSet, seed: int) -> None:
        self._images, self._seed = images, seed

    def batch(self, items: Sequence[tuple[int, int]], refusals: list[Refusal]) -> list[Instances]:
        return [
            flipped(self._images.load(i)) if mix(self._seed, epoch, i, 1) % 2 else self._images.load(i)
            for epoch, i in items
        ]


class _AsTheyAre(Batches):
    def __init__(self, images: CocoSet) -> None:
        self._images = images

    def batch(self, items: Sequence[int], refusals: list[Refusal]) -> list[Instances]:
        return [self._images.load(i) for i in items]


def flipped(one: Instances) -> Instances:
    """Left and right exchanged."""
    left, top, right, bottom = one.boxes.unbind(1)
    width = one.image.shape[-1]
    boxes = torch.stack([width - right, top, width - left, bottom], dim=1)
    return Instances(one.image.flip(-1), boxes, one.labels, one.masks.flip(-1))
