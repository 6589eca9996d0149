"""Indicators of collapse: standard deviation and effective rank of features."""

import math

import torch
import torch.nn.functional as F

from dspnet_fast.machine import in_float64

# A network with values below one of these has collapsed: its features are nearly a point or a line.
MIN_STD, MIN_RANK = 0.1, 2.0
ADVICE = "lower --base-lr, lengthen --warmup-epochs, or raise --tau towards 1"


def feature_std(features: torch.Tensor) -> float:
    """Mean standard deviation of features [N, D] normalised to length 1, times sqrt(D).

    It is 1 if the features are isotropic and 0 if all are equal (Chen & He 2021, "SimSiam", section 4.1).
    """
    unit = F.normalize(features.float(), dim=1)
    return (unit.std(dim=0, correction=0).mean() * math.sqrt(unit.shape[1])).item()


def effective_rank(features: torch.Tensor) -> float:
    """Exponential of the entropy of the normalised singular values of features [N, D], which are not centred.

    It lies between 1 and min(N, D) (Roy & Vetterli 2007; RankMe, Garrido et al. 2023). It is NaN if a feature is not
    finite, or if all are 0.
    """
    features = in_float64(features)
    if not features.isfinite().all():
        return math.nan
    # The smaller Gram matrix in float64 is accurate enough, and much cheaper than a singular value decomposition.
    gram = features.T @ features if features.shape[0] > features.shape[1] else features @ features.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


def collapsed(std: float | None, rank: float | None) -> bool:
    """Whether a measured feature std or effective rank is below its limit or NaN; None: not measured."""
    limits = ((std, MIN_STD), (rank, MIN_RANK))
    return any(value is not None and not value >= limit for value, limit in limits)
