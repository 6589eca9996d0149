"""Whether features still tell images apart: their spread and their rank."""

import math

import torch
import torch.nn.functional as F

# Below one of these a network has collapsed: its features are all but one point, or one direction.
LEAST_STD, LEAST_RANK = 0.1, 2.0
ADVICE = "lower --base-lr, lengthen --warmup-epochs, or bring --tau nearer to 1"


def feature_std(features: torch.Tensor) -> float:
    """sqrt(D) times the mean over D dimensions of the std of features [N, D] scaled to length 1.

    1 if they spread evenly in all directions, 0 if all are one point (Chen & He 2021, "SimSiam", section 4.1).
    """
    unit = F.normalize(features.float(), dim=1)
    return (unit.std(dim=0, correction=0).mean() * math.sqrt(unit.shape[1])).item()


def effective_rank(features: torch.Tensor) -> float:
    """exp of the entropy of the singular values of features [N, D] as shares of their sum; not centred.

    From 1 to min(N, D) (Roy & Vetterli 2007; as a measure of pretraining RankMe, Garrido et al. 2023). NaN if a feature
    is not finite or if all are 0.
    """
    features = features.double()
    if not features.isfinite().all():
        return math.nan
    # in float64 the smaller Gram matrix is exact enough, and far cheaper than singular values of N rows
    gram = features.T @ features if features.shape[0] > features.shape[1] else features @ features.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


def collapsed(spread: float | None, rank: float | None) -> bool:
    """Whether features of this spread and rank are all but one point or one direction, or not finite.

    None is what was not measured.
    """
    low = ((spread, LEAST_STD), (rank, LEAST_RANK))
    return any(value is not None and not value >= limit for value, limit in low)
