"""The verdict on a finished run: its networks on the probe's images, before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.accuracy import interval95
from ..evaluation.verdict import RAW_PIXELS, TEACHER, UNTRAINED, Baseline, Score, Verdict, describe, judge
from .probe import Probe


def verdict_of(
    metrics: Sequence[Mapping[str, Any]],
    probe: Probe,
    initialized: bool,
    teacher: float | None = None,
) -> Verdict | None:
    """The verdict on a run.

    Args:
        metrics: the run's recorded metrics.
        probe: the probe that measured them.
        initialized: whether the run began with trained weights.
        teacher: the teacher's accuracy on the same images.

    Returns:
        The verdict; None if nothing was measured.
    """

    def score(accuracy: float) -> Score:
        return Score(accuracy, interval95(accuracy, probe.queries))

    def scores(line: Mapping[str, Any]) -> dict[str, Score]:
        return {name: score(accuracy) for name, accuracy in line["knn"].items()}

    measured = [line for line in metrics if "feature_std" in line]
    if not measured:
        return None
    before = measured[0] if measured[0]["step"] == 0 else None
    pixels = probe.raw_pixels()
    if pixels is None:
        return describe(before, measured[-1])
    baselines = [] if before is None else [Baseline("before training" if initialized else UNTRAINED, scores(before))]
    baselines.append(Baseline(RAW_PIXELS, score(pixels)))
    if teacher is not None:
        baselines.append(Baseline(TEACHER, score(teacher), to_beat=False))
    on = f"kNN accuracy on {probe.queries:,} images with {probe.references:,} references"
    return judge(scores(measured[-1]), baselines, on)
