"""The probe: kNN accuracy, feature std and effective rank of every subnet on a few images, during training."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspnet_fast.statistics import post_statistics
from dspnet_fast.subnets import Family

from ..data.bad_images import BadImages
from ..data.datasets.images import ImageDataset, Subset
from ..data.loader import readable_views
from ..data.normalization import prepare
from ..evaluation.collapse import effective_rank, feature_std
from ..evaluation.features import extract
from ..evaluation.knn import knn

NEIGHBOURS = 20
RAW_SIZE = 64  # pixels
BATCH = 256


class Probe:
    """Measures subnets on evaluation views of `count` training images and half as many test images.

    The images are drawn with a fixed seed, so all measurements of all runs use the same ones. Unreadable images are
    omitted and counted in `bad`.
    """

    def __init__(
        self, train: ImageDataset, test: ImageDataset, count: int, image_size: int, device: torch.device, bad: BadImages
    ) -> None:
        self._device = device
        self._reference, self._reference_labels = _draw(train, count, image_size, bad)
        self._query, self._query_labels = _draw(test, max(1, count // 2), image_size, bad)
        self._classes = len(train.classes)

    @property
    def queries(self) -> int:
        """Number of images that are classified."""
        return len(self._query)

    @property
    def references(self) -> int:
        """Number of images among which neighbours are searched."""
        return len(self._reference)

    def _batches(self, images: Tensor) -> Iterator[Tensor]:
        for batch in images.split(BATCH):
            yield prepare(batch, self._device)

    def measure(self, encoder: nn.Module, family: Family) -> dict[str, dict[str, float]]:
        """Measure all subnets of a family.

        The encoder keeps its training mode and weights; its post-statistics are measured anew.

        Returns:
            {"knn": {subnet: accuracy}, "feature_std": {subnet: std}, "effective_rank": {subnet: rank}}, without "knn"
            if the images have no labels.
        """
        training = encoder.training
        post_statistics(encoder, family, self._batches(self._reference))
        references = extract(encoder, family, self._batches(self._reference))
        result = {
            "feature_std": {name: feature_std(features) for name, features in references.items()},
            "effective_rank": {name: effective_rank(features) for name, features in references.items()},
        }
        if self._reference_labels is not None and self._query_labels is not None:
            queries = extract(encoder, family, self._batches(self._query))
            result["knn"] = {name: self._knn(references[name], queries[name]) for name in references}
        encoder.train(training)
        return result

    def raw_pixels(self) -> float | None:
        """kNN accuracy of the views' pixels, of at most RAW_SIZE x RAW_SIZE; None if the images have no labels."""
        if self._reference_labels is None or self._query_labels is None:
            return None
        return self._knn(_pixels(self._reference), _pixels(self._query))

    def accuracy(self, features: Callable[[Tensor], Tensor]) -> float | None:
        """kNN accuracy of another network's features of normalised images; None if the images have no labels."""
        if self._reference_labels is None or self._query_labels is None:
            return None
        found = [
            torch.cat([features(batch).cpu() for batch in self._batches(images)])
            for images in (self._reference, self._query)
        ]
        return self._knn(*found)

    def _knn(self, references: Tensor, queries: Tensor) -> float:
        """Accuracy of the majority vote with these features."""
        assert self._reference_labels is not None and self._query_labels is not None
        k = min(NEIGHBOURS, len(references))
        found = knn(references, self._reference_labels, queries, self._query_labels, k=k, num_classes=self._classes)
        return found.majority


def _pixels(images: Tensor) -> Tensor:
    """Pixels as features, [n, C * S * S] with S up to RAW_SIZE."""
    size = min(RAW_SIZE, images.shape[-1])
    return torch.cat(
        [F.interpolate(part.float(), (size, size), mode="area").flatten(1) for part in images.split(BATCH)]
    )


def _draw(images: ImageDataset, count: int, image_size: int, bad: BadImages) -> tuple[Tensor, Tensor | None]:
    """Evaluation views [n, C, S, S] and labels [n] of up to `count` images."""
    drawn = Subset.up_to(count, images)
    pixels, kept = readable_views(drawn, image_size, bad)
    return pixels, None if drawn.labels is None else drawn.labels[kept]
