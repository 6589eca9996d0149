"""The error rule: a provider may be off from float64 by twice what the native body of the same dtype is off by, in
gradients by three times as much, and by a few units in the last place of the largest value.

That value is the largest of the result itself, in its own dtype, and of all results, in fp32. The latter because sums
may cancel to almost nothing, and the native body may then be right by luck: what fp32 loses is a share of the terms.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

OUTPUT, GRADIENT = 2, 3


def check_errors(
    names: Sequence[str], got: Sequence[Tensor], native: Sequence[Tensor], exact: Sequence[Tensor], factor: int
) -> None:
    """Apply the rule to each result; all three sequences hold the same results, `exact` in float64."""
    largest = max((truth.abs().max().item() for truth in exact if truth.numel()), default=0.0)
    fp32_unit = torch.finfo(torch.float32).eps * largest
    for name, ours, eager, truth in zip(names, got, native, exact, strict=True):
        assert ours.shape == truth.shape and ours.dtype == eager.dtype, name
        if not truth.numel():
            continue
        assert ours.isfinite().all(), f"{name} is not finite"
        error, same_dtype = ((result.double() - truth).abs().max().item() for result in (ours, eager))
        unit = max(torch.finfo(ours.dtype).eps * truth.abs().max().item(), fp32_unit)
        assert error <= factor * same_dtype + 4 * unit, f"{name}: off by {error:.3g}, native by {same_dtype:.3g}"
