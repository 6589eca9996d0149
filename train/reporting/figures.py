"""Figures of the report: curves over epochs, and costs as bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..evaluation.drawing import WIDTH, Draw, Theme, legend
from .findings import Curve

DASHES = ("-", "--", ":", "-.")
LABEL_GAP = 0.055  # smallest distance of two labels, as a fraction of the axis
POINTS = 240  # largest number of points of a curve; longer curves are averaged


def styles(names: Sequence[str], theme: Theme) -> dict[str, dict[str, Any]]:
    """Colour and dashes of each network's curve: all colours with solid lines, then again with other dashes."""
    count = len(theme.colours)
    return {
        name: {"color": theme.colours[i % count], "linestyle": DASHES[i // count % len(DASHES)]}
        for i, name in enumerate(names)
    }


def label_ends(axes: Axes, ends: Mapping[str, tuple[float, float]], colours: Mapping[str, str]) -> None:
    """Write the name of each curve beside its end, moved apart where curves end close together."""
    low, high = axes.get_ylim()
    gap, previous = (high - low) * LABEL_GAP, low - (high - low)
    for name, (x, y) in sorted(ends.items(), key=lambda item: item[1][1]):
        previous = max(y, previous + gap)
        axes.annotate(
            name,
            (x, previous),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colours[name],
            annotation_clip=False,
        )


def curves(lines: Mapping[str, Curve], label: str, percent: bool = False, mark: bool = False) -> Draw:
    """Figure of curves over epochs.

    Args:
        lines: epochs and values by network, smallest first; a single curve without legend has the name "".
        label: label of the values.
        percent: show values from 0 to 1 in percent.
        mark: mark each value.
    """

    def draw(theme: Theme) -> Figure:
        figure, axes = _over_epochs(label, percent)
        drawn = styles(list(lines), theme)
        ends = {}
        for name, (x, y) in lines.items():
            xs, ys = averaged(x), averaged(y)
            axes.plot(xs, ys, **drawn[name], label=name, marker="o" if mark else None, markersize=3)
            if ys and math.isfinite(ys[-1]):
                ends[name] = xs[-1], ys[-1]
        if list(lines) != [""]:
            legend(figure, list(lines))
            label_ends(axes, ends, {name: drawn[name]["color"] for name in lines})
        return figure

    return draw


def bands(lines: Mapping[str, Mapping[str, Sequence[float]]], label: str, percent: bool = False) -> Draw:
    """Figure of curves over epochs with bands of their ranges.

    Args:
        lines: "epochs", "mean", "low" and "high" by name.
        label: label of the values.
        percent: show values from 0 to 1 in percent.
    """

    def draw(theme: Theme) -> Figure:
        figure, axes = _over_epochs(label, percent)
        for name, style in styles(list(lines), theme).items():
            line = lines[name]
            axes.plot(line["epochs"], line["mean"], **style, label=name)
            axes.fill_between(line["epochs"], line["low"], line["high"], color=style["color"], alpha=0.25, linewidth=0)
        legend(figure, list(lines))
        return figure

    return draw


def _over_epochs(label: str, percent: bool) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.margins(x=0.02)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure, axes


def bars(rows: Mapping[str, Mapping[str, float]], label: str) -> Draw:
    """Figure of stacked horizontal bars.

    Args:
        rows: parts by row, the first row on top; parts may be missing.
        label: label of the sums, with their unit.
    """
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(WIDTH, 1.1 + 0.36 * len(rows)), layout="constrained")
        axes = figure.subplots()
        names = list(rows)
        ends = [0.0] * len(rows)
        for index, part in enumerate(parts):
            lengths = [rows[name].get(part, 0.0) for name in names]
            axes.barh(names, lengths, left=ends, height=0.62, color=theme.colours[index], label=part)
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
        for name, end in zip(names, ends, strict=True):
            axes.annotate(
                f"{end:,.0f}" if end >= 100 else f"{end:.3g}",
                (end, name),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.12)
        axes.set_xlabel(label)
        legend(figure, parts)
        return figure

    return draw


def averaged(values: Sequence[float]) -> list[float]:
    """Reduce values to at most POINTS means of consecutive groups of equal size, except the last."""
    group = -(-len(values) // POINTS)
    parts = [values[start : start + group] for start in range(0, len(values), max(1, group))]
    return [sum(part) / len(part) for part in parts]
