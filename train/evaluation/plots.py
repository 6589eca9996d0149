"""Figures of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..run.atomic import write_atomically

COLOURS = ("#2563a8", "#8a8f98", "#c8551b", "#3b8a4b", "#7a4fa3", "#b0892b")


class Point(NamedTuple):
    """A network: multiply-accumulates per image, accuracy and the half-width of its interval from 0 to 1."""

    name: str
    macs: float
    accuracy: float
    interval: float


def accuracy_over_macs(
    path: Path, label: str, series: Mapping[str, Sequence[Point]], lines: Mapping[str, float]
) -> None:
    """Plot accuracies with their 95 % intervals over multiply-accumulates as a PNG.

    Args:
        path: of the picture.
        label: of the accuracies.
        series: points by what they have in common; those of the first are named.
        lines: accuracies that belong to no network, drawn across the figure.
    """
    import matplotlib  # here: a second of import that training does not need

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for index, (name, unsorted) in enumerate(series.items()):
        points = sorted(unsorted, key=lambda point: point.macs)
        macs = [point.macs / 1e6 for point in points]
        accuracies, errors = ([100 * value for value in column] for column in list(zip(*points, strict=True))[2:])
        colour = COLOURS[index % len(COLOURS)]
        axes.errorbar(macs, accuracies, errors, color=colour, marker="o", capsize=3, label=name)
        for point in points if index == 0 else ():
            place = (point.macs / 1e6, 100 * point.accuracy)
            axes.annotate(point.name, place, textcoords="offset points", xytext=(6, 8), fontsize=9)
    for name, accuracy in lines.items():
        axes.axhline(100 * accuracy, color=COLOURS[1], linestyle="--", label=name)
    axes.margins(x=0.18, y=0.15)
    axes.set_xlabel("multiply-accumulates per image, millions")
    axes.set_ylabel(f"{label}, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    plt.close(figure)
