"""The verdict on a run: sentences that compare its networks with untrained ones and raw pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..run.tables import percent

VERDICT = "verdict.json"  # in the run directory
UNTRAINED, RAW_PIXELS, TEACHER = "untrained", "raw pixels", "the teacher"
ADVICE = "Train longer (more --epochs), use a --teacher, or start from published weights (--init-from)."
TAUGHT_ADVICE = "Train longer (more --epochs), or start from published weights (--init-from)."
UNLABELLED = (
    "The images have no labels, so the accuracy is unknown. To measure it on other images: dspnet-evaluate knn OUT "
    "--data LABELLED --baselines"
)


@dataclass(frozen=True)
class Score:
    """An accuracy from 0 to 1 and the half-width of its 95 % interval."""

    accuracy: float
    interval: float

    def beats(self, other: Score) -> bool:
        """Whether this accuracy is higher by more than both intervals."""
        return self.accuracy - self.interval > other.accuracy + other.interval

    def __str__(self) -> str:
        return percent(self.accuracy, self.interval)


@dataclass(frozen=True)
class Baseline:
    """A result to compare networks with.

    Attributes:
        name: name in the text, such as "raw pixels".
        scores: scores by network, or one score for all.
        to_beat: whether a network that is not better is a failure; not so for a teacher.
    """

    name: str
    scores: Mapping[str, Score] | Score
    to_beat: bool = True

    def of(self, network: str) -> Score:
        """The score to compare a network with."""
        return self.scores if isinstance(self.scores, Score) else self.scores[network]


@dataclass(frozen=True)
class Verdict:
    """Sentences about a run.

    Attributes:
        good: whether every network is better than every baseline that it has to beat.
        details: a line about the measurement and lines about each network.
        conclusion: the last line.
    """

    good: bool
    details: tuple[str, ...]
    conclusion: str

    @property
    def lines(self) -> tuple[str, ...]:
        """All lines."""
        return (*self.details, self.conclusion)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {"good": self.good, "details": list(self.details), "conclusion": self.conclusion}


def judge(networks: Mapping[str, Score], baselines: Sequence[Baseline], measured_on: str) -> Verdict:
    """Compare networks with baselines.

    Args:
        networks: scores by network, smallest first.
        baselines: results to compare with.
        measured_on: description of the measurement.
    """
    details = [f"{measured_on}; ± is the half-width of the 95 % interval"]
    failed: dict[str, list[str]] = {}
    for name, score in networks.items():
        parts = [f"{name}  {score}"]
        for baseline in baselines:
            other = baseline.of(name)
            better = score.beats(other)
            word = "better than" if better else "worse than" if other.beats(score) else "not clearly different from"
            parts.append(f"{word} {baseline.name} ({other})")
            if baseline.to_beat and not better:
                failed.setdefault(baseline.name, []).append(name)
        details.append(", ".join(parts))
    if failed:
        found = "; ".join(f"not better than {name}: {', '.join(worse)}" for name, worse in failed.items())
        taught = any(baseline.name == TEACHER for baseline in baselines)
        conclusion = f"{found[0].upper()}{found[1:]}. {TAUGHT_ADVICE if taught else ADVICE}"
    else:
        names = " and ".join(baseline.name for baseline in baselines if baseline.to_beat)
        conclusion = f"Every network is better than {names}."
    return Verdict(not failed, tuple(details), conclusion)


def describe(before: Mapping[str, Mapping[str, float]] | None, after: Mapping[str, Mapping[str, float]]) -> Verdict:
    """The verdict on networks whose images have no labels: collapse indicators without a comparison.

    Args:
        before, after: {"effective_rank": {network: rank}, "feature_std": {network: std}} before and after training.
    """
    details = []
    for name, rank in after["effective_rank"].items():
        std = after["feature_std"][name]
        line = f"{name}  effective rank of the features {rank:.1f}, standard deviation {std:.2f}"
        if before is not None:
            line += f"; untrained: {before['effective_rank'][name]:.1f} and {before['feature_std'][name]:.2f}"
        details.append(line)
    return Verdict(True, tuple(details), UNLABELLED)
