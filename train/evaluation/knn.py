"""How good features are without training anything on them: nearest neighbours' votes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dspnet_fast.errors import InputError

from .accuracy import interval95

TEMPERATURE = 0.07  # Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"


@dataclass(frozen=True)
class KnnResult:
    """Accuracies from 0 to 1, and the half-width of the majority vote's 95 % interval."""

    majority: float
    weighted: float
    interval: float


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
    """Classify features [M, D] by the k nearest of [N, D] in cosine similarity; labels are int64 [M] and [N].

    `majority` takes the most frequent label, of several the smallest. `weighted` sums exp(cosine / TEMPERATURE) per
    label (Wu et al. 2018). Similarities are computed in the features' precision, float32 at least, in pieces of at
    most `chunk` numbers or one row. InputError if k is not between 1 and N, or if M is 0.
    """
    n, m = len(train_features), len(test_features)
    if not 1 <= k <= n:
        raise InputError(f"{k} neighbours out of {n} training images: give a k from 1 to {n}")
    if m == 0:
        raise InputError("no test images to classify: give a test split with images")
    dtype = torch.promote_types(train_features.dtype, torch.float32)
    train = F.normalize(train_features.to(dtype), dim=1)
    test = F.normalize(test_features.to(dtype), dim=1)
    # a count times num_classes, plus more for smaller labels: an integer whose largest is unique on every device
    preference = torch.arange(num_classes, device=train.device).flip(0)
    right = torch.zeros(2, dtype=torch.int64, device=train.device)
    rows = max(1, chunk // n)
    for piece, labels in zip(test.split(rows), test_labels.to(train.device).split(rows), strict=True):
        similarities, neighbours = (piece @ train.T).topk(k, dim=1)
        votes = train_labels.to(train.device)[neighbours]
        counts = votes.new_zeros(len(piece), num_classes).scatter_add_(1, votes, torch.ones_like(votes))
        weights = similarities.new_zeros(len(piece), num_classes)
        weights.scatter_add_(1, votes, (similarities / TEMPERATURE).exp())
        winners = torch.stack([(counts * num_classes + preference).argmax(dim=1), weights.argmax(dim=1)])
        right += (winners == labels).sum(dim=1)
    majority, weighted = (right.double() / m).tolist()
    return KnnResult(majority, weighted, interval95(majority, m))
