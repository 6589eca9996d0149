"""What changes over a run, each a pure function of the step k of K, so that a resumed run needs no state for it."""

import math


def learning_rate(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up to `peak` at `warmup_steps`, then a cosine to 0 at `steps` (Loshchilov & Hutter 2016)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def target_tau(step: int, steps: int, start: float) -> float:
    """BYOL's target decay: 1 - (1 - start) (cos(pi k / K) + 1) / 2, from `start` to 1."""
    return 1 - (1 - start) * (math.cos(math.pi * step / steps) + 1) / 2


def momentum_alpha(step: int, steps: int) -> float:
    """Share of the batch in momentum batch normalisation: (cos(pi k / K) + 1) / 2, from 1 to 0 (Li et al. 2021)."""
    return (math.cos(math.pi * step / steps) + 1) / 2
