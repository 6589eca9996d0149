"""Classification by the k nearest neighbours in feature space."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dspnet_fast.errors import InputError
from dspnet_fast.machine import in_float64

from .accuracy import interval95

TEMPERATURE = 0.07  # Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"


@dataclass(frozen=True)
class KnnResult:
    """Accuracies from 0 to 1 of majority and weighted vote; half-width of the 95 % interval of the former."""

    majority: float
    weighted: float
    interval: float


def check_neighbours(k: int, images: int) -> None:
    """Raise InputError if there are fewer training images than neighbours."""
    if not 1 <= k <= images:
        raise InputError(f"{k} neighbours among {images} training images: choose k from 1 to {images}")


def knn(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    num_classes: int,
    k: int = 20,
    chunk: int = 2**26,
) -> KnnResult:
    """Classify test features by their k nearest training features in cosine similarity.

    The majority vote chooses the most frequent label, and the smallest of equally frequent ones. The weighted vote
    sums exp(cosine / TEMPERATURE) per label (Wu et al. 2018).

    Args:
        train_features: features [N, D]; similarities are computed in their dtype, float32 at least.
        train_labels: int64 [N].
        test_features: features [M, D].
        test_labels: int64 [M].
        num_classes: number of classes.
        k: number of neighbours.
        chunk: largest number of similarities in memory, if it is at least N.

    Raises:
        InputError: if k is not between 1 and N, or if M is 0.
    """
    n, m = len(train_features), len(test_features)
    check_neighbours(k, n)
    if m == 0:
        raise InputError("no test images to classify: the test split is empty")
    dtype = torch.promote_types(train_features.dtype, torch.float32)
    train = F.normalize(train_features.to(dtype), dim=1)
    test = F.normalize(test_features.to(dtype), dim=1)
    # Breaks ties of counts in favour of smaller labels: argmax of equal values depends on the device.
    preference = torch.arange(num_classes, device=train.device).flip(0)
    correct = torch.zeros(2, dtype=torch.int64, device=train.device)
    rows = max(1, chunk // n)
    for piece, labels in zip(test.split(rows), test_labels.to(train.device).split(rows), strict=True):
        similarities, neighbours = (piece @ train.T).topk(k, dim=1)
        votes = train_labels.to(train.device)[neighbours]
        counts = votes.new_zeros(len(piece), num_classes).scatter_add_(1, votes, torch.ones_like(votes))
        weights = similarities.new_zeros(len(piece), num_classes)
        weights.scatter_add_(1, votes, (similarities / TEMPERATURE).exp())
        winners = torch.stack([(counts * num_classes + preference).argmax(dim=1), weights.argmax(dim=1)])
        correct += (winners == labels).sum(dim=1)
    majority, weighted = (in_float64(correct) / m).tolist()
    return KnnResult(majority, weighted, interval95(majority, m))
