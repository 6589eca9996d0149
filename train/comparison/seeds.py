"""What runs with several seeds give together."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any


def summary(values: Iterable[float]) -> dict[str, float]:
    """Mean and range."""
    values = list(values)
    return {"mean": statistics.fmean(values), "low": min(values), "high": max(values)}


def over_seeds(by_seed: Mapping[int, Any], protocol: str, dn: str) -> dict[str, Any]:
    """Mean and range over the seeds, with the mean half-width of the 95 % interval that each has."""
    found = {seed: scores[protocol][dn] for seed, scores in by_seed.items()}
    return {
        **summary(score["accuracy"] for score in found.values()),
        "interval": statistics.fmean(score["interval"] for score in found.values()),
        "seeds": {str(seed): score for seed, score in found.items()},
    }
