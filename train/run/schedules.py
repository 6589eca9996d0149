"""Schedules: pure functions of the step, so that a resumed run needs no state for them."""

import math
from collections.abc import Sequence


def learning_rate(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up to `peak` at `warmup_steps`, then a cosine to 0 at `steps` (Loshchilov & Hutter 2016).

    Args:
        step: of the run, from 0.
        steps: of the whole run.
        warmup_steps: steps of the warm-up.
        peak: the highest learning rate.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def stepped_learning_rate(step: int, warmup_steps: int, peak: float, drops: Sequence[int]) -> float:
    """Linear warm-up to `peak` at `warmup_steps`, then division by 10 at each of the steps `drops`."""
    warm = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    return peak * warm / 10 ** sum(step >= drop for drop in drops)


def target_tau(step: int, steps: int, start: float) -> float:
    """BYOL's decay rate of the target: 1 - (1 - start) (cos(pi step / steps) + 1) / 2, from `start` to 1."""
    return 1 - (1 - start) * (math.cos(math.pi * step / steps) + 1) / 2


def weight_decay(step: int, steps: int, start: float, end: float) -> float:
    """A cosine from `start` to `end`, as of DINO (Caron et al. 2021): constant if both are equal."""
    return end - (end - start) * (math.cos(math.pi * step / steps) + 1) / 2


def momentum_alpha(step: int, steps: int) -> float:
    """Weight of the batch in momentum batch norm: (cos(pi step / steps) + 1) / 2, from 1 to 0 (Li et al. 2021)."""
    return (math.cos(math.pi * step / steps) + 1) / 2
