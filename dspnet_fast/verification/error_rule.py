"""The error rule: the bound on a provider's error.

A provider's error against float64 is at most twice the error of the native body in the same dtype, three times for
gradients, plus a few units in the last place of the largest value. That value is the largest of the result, in its
dtype, or of all results, in fp32: sums may cancel to almost nothing, where the rounding of their terms remains and the
native body may be exact by chance.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import triton

OUTPUT, GRADIENT = 2, 3  # allowed multiples of the native body's error
# Units in the last place. Triton's interpreter sums the rows of a tile sequentially, a GPU pairwise.
UNITS = 16 if triton.INTERPRETED else 4


def judge(
    names: Sequence[str], got: Sequence[Tensor], native: Sequence[Tensor], exact: Sequence[Tensor], factor: int
) -> tuple[str, float]:
    """Apply the error rule to the results of a call.

    Args:
        names: names of the results.
        got: results of the provider.
        native: results of the native body in the same dtype.
        exact: results of the native body in float64.
        factor: OUTPUT or GRADIENT.

    Returns:
        The first violation in words, or an empty string; and the largest error as a share of its bound, above 1 if this
        is what the rule is violated by.
    """
    largest = max((truth.abs().max().item() for truth in exact if truth.numel()), default=0.0)
    fp32_unit = torch.finfo(torch.float32).eps * largest
    worst = 0.0
    for name, ours, eager, truth in zip(names, got, native, exact, strict=True):
        if ours.shape != eager.shape or ours.dtype != eager.dtype:
            found, expected = (f"{list(result.shape)} {result.dtype}" for result in (ours, eager))
            return f"{name} is {found}, not {expected}", worst
        if not truth.numel():
            continue
        if not ours.isfinite().all():
            bad = ours.numel() - int(ours.isfinite().sum())
            return f"{name} is not finite, in {bad} of {ours.numel()} elements", worst
        error, same_dtype = ((result.double() - truth).abs().max().item() for result in (ours, eager))
        unit = max(torch.finfo(ours.dtype).eps * truth.abs().max().item(), fp32_unit)
        bound = factor * same_dtype + UNITS * unit
        worst = max(worst, error / bound if bound else 0.0)
        if error > bound:
            return f"{name} is off by {error:.3g}, the native body by {same_dtype:.3g}; allowed are {bound:.3g}", worst
    return "", worst
