"""Batches of COCO images with their boxes and masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from ..run.options import Workers
from .bad_images import Unreadable
from .datasets.coco import CocoDataset, Instances
from .loader import BatchDataset, make_loader, worker_count
from .sampler import EpochSampler, mix


def training_batches(images: CocoDataset, sampler: EpochSampler, workers: Workers) -> Iterator[list[Instances]]:
    """Yield the images of each batch, mirrored with probability 1/2 as a function of (seed, epoch, image)."""
    yield from make_loader(_TrainingDataset(images, sampler.seed), sampler, worker_count(workers, len(images)))


def evaluation_images(images: CocoDataset, workers: Workers) -> Iterable[list[Instances]]:
    """Return the images in the dataset's order, one per batch."""
    each = [[i] for i in range(len(images))]
    return make_loader(_EvaluationDataset(images), each, worker_count(workers, len(images)))


class _TrainingDataset(BatchDataset):
    def __init__(self, images: CocoDataset, seed: int) -> None:
        self._images, self._seed = images, seed

    def batch(self, items: Sequence[tuple[int, int]], unreadable: list[Unreadable]) -> list[Instances]:
        return [
            flip(self._images.load(i)) if mix(self._seed, epoch, i, 1) % 2 else self._images.load(i)
            for epoch, i in items
        ]


class _EvaluationDataset(BatchDataset):
    def __init__(self, images: CocoDataset) -> None:
        self._images = images

    def batch(self, items: Sequence[int], unreadable: list[Unreadable]) -> list[Instances]:
        return [self._images.load(i) for i in items]


def flip(instances: Instances) -> Instances:
    """Mirror an image, its boxes and its masks left to right."""
    left, top, right, bottom = instances.boxes.unbind(1)
    width = instances.image.shape[-1]
    masks = None if instances.masks is None else instances.masks.flip(-1)
    boxes = torch.stack([width - right, top, width - left, bottom], dim=1)
    return Instances(instances.image.flip(-1), boxes, instances.labels, masks)
