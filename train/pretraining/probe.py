"""How good a family is while it trains: kNN accuracy, feature spread and rank of every subnet on a few images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dspnet_fast.statistics import post_statistics
from dspnet_fast.subnets import Family

from ..data.bad_images import BadImages
from ..data.images import ImageSet, Subset
from ..data.loader import readable_views
from ..data.normalization import normalize
from ..evaluation.collapse import effective_rank, feature_std
from ..evaluation.features import extract
from ..evaluation.knn import knn

NEIGHBOURS = 20
BATCH = 256


class Probe:
    """Holds evaluation views of `count` training images and, where there are labels, of half as many test images.

    The images are drawn with a fixed seed, so that all measurements of all runs use the same ones. Those that cannot be
    read are left out and counted in `bad`.
    """

    def __init__(
        self, train: ImageSet, test: ImageSet, count: int, image_size: int, device: torch.device, bad: BadImages
    ) -> None:
        self._device = device
        self._reference, self._reference_labels = _draw(train, count, image_size, bad)
        self._query, self._query_labels = _draw(test, max(1, count // 2), image_size, bad)
        self._classes = len(train.classes)

    def _batches(self, images: Tensor) -> Iterator[Tensor]:
        for batch in images.split(BATCH):
            yield normalize(batch.to(self._device))

    def measure(self, encoder: nn.Module, family: Family) -> dict[str, dict[str, float]]:
        """{"knn": {subnet: accuracy}, "feature_std": {subnet: spread}, "effective_rank": {subnet: dimensions}}.

        No "knn" without labels.

        The encoder's training state is left as it was, but for its post-statistics.
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
            result["knn"] = {
                name: knn(
                    references[name],
                    self._reference_labels,
                    queries[name],
                    self._query_labels,
                    k=min(NEIGHBOURS, len(references[name])),
                    num_classes=self._classes,
                ).majority
                for name in references
            }
        encoder.train(training)
        return result


def _draw(images: ImageSet, count: int, image_size: int, bad: BadImages) -> tuple[Tensor, Tensor | None]:
    """Evaluation views uint8 [n, C, S, S] and labels [n] of up to `count` images."""
    drawn = Subset.random(images, min(count, len(images)), seed=0)
    pixels, kept = readable_views(drawn, image_size, bad)
    return pixels, None if drawn.labels is None else drawn.labels[kept]
