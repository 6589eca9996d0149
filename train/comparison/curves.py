"""Training curves of the largest network, alone and in a family, over seeds (the paper's figure A2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..reporting.figures import averaged
from ..run.log import read_metrics
from .seeds import mean_and_range

MEASURES = {"loss": "loss", "knn": "kNN accuracy"}  # metrics of a run, and their labels


def curves_over_seeds(runs: Mapping[str, Iterable[Path]], network: str, epoch_steps: int) -> dict[str, Any]:
    """Curves of a network: mean, minimum and maximum over the seeds at the steps that all of them recorded.

    Args:
        runs: run directories of all seeds, by variant.
        network: name of the network.
        epoch_steps: steps per epoch.

    Returns:
        {metric: {variant: {"epochs", "mean", "low", "high"}}}, four lists of at most 240 values. Of longer curves,
        means of consecutive steps are taken for each seed first. Metrics that were not recorded are missing.
    """
    found: dict[str, Any] = {}
    for variant, outs in runs.items():
        metrics = [read_metrics(out) for out in outs]
        for measure in MEASURES:
            seeds = [_curve(lines, measure, network) for lines in metrics]
            steps = sorted(set.intersection(*map(set, seeds)))
            if steps:
                curves = [averaged([seed[step] for step in steps]) for seed in seeds]
                ranges = [mean_and_range(values) for values in zip(*curves, strict=True)]
                found.setdefault(measure, {})[variant] = {
                    "epochs": averaged([step / epoch_steps for step in steps]),
                    **{name: [point[name] for point in ranges] for name in ("mean", "low", "high")},
                }
    return found


def _curve(metrics: Iterable[Mapping[str, Any]], name: str, network: str) -> dict[int, float]:
    """Finite values of a metric of a network by step."""
    values = {line["step"]: line[name][network] for line in metrics if network in line.get(name, {})}
    return {step: value for step, value in values.items() if math.isfinite(value)}
