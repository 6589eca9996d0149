"""Means and ranges over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any


def mean_and_range(values: Iterable[float]) -> dict[str, float]:
    """Mean, minimum and maximum."""
    values = list(values)
    return {"mean": statistics.fmean(values), "low": min(values), "high": max(values)}


def score_over_seeds(by_seed: Mapping[int, Any], protocol: str, dn: str) -> dict[str, Any]:
    """Mean and range of a network's accuracy over seeds, and the mean half-width of its 95 % intervals.

    Args:
        by_seed: accuracies by seed, protocol and network.
        protocol: "kNN" or "linear".
        dn: name of the network.
    """
    found = {seed: scores[protocol][dn] for seed, scores in by_seed.items()}
    return {
        **mean_and_range(score["accuracy"] for score in found.values()),
        "interval": statistics.fmean(score["interval"] for score in found.values()),
        "seeds": {str(seed): score for seed, score in found.items()},
    }
