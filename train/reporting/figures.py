"""Figures of the report: curves over epochs, and costs as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..evaluation.drawing import Draw, Theme, legend
from .findings import Curve

POINTS = 240  # largest number of points of a curve; longer curves are averaged


def shades(names: Sequence[str], theme: Theme) -> dict[str, str]:
    """A colour of viridis for each network, smallest first."""
    low, high = theme.shades
    last = max(1, len(names) - 1)
    return {name: to_hex(colormaps["viridis"](low + (high - low) * i / last)) for i, name in enumerate(names)}


def curves(lines: Mapping[str, Curve], label: str, percent: bool = False, mark: bool = False) -> Draw:
    """Figure of curves over epochs.

    Args:
        lines: epochs and values by network, smallest first; a single curve without legend has the name "".
        label: label of the values.
        percent: show values from 0 to 1 in percent.
        mark: mark each value.
    """

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(6.0, 3.4), layout="constrained")
        axes = figure.subplots()
        colours = {"": theme.colours[0]} if list(lines) == [""] else shades(list(lines), theme)
        for name, (x, y) in lines.items():
            xs, ys = averaged(x), averaged(y)
            axes.plot(xs, ys, color=colours[name], label=name, marker="o" if mark else None, markersize=3)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.margins(x=0.02)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if list(lines) != [""]:
            legend(figure, list(lines))
        return figure

    return draw


def bars(rows: Mapping[str, Mapping[str, float]], label: str) -> Draw:
    """Figure of stacked horizontal bars.

    Args:
        rows: parts by row, the first row on top; parts may be missing.
        label: label of the sums, with their unit.
    """
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(6.0, 1.1 + 0.36 * len(rows)), layout="constrained")
        axes = figure.subplots()
        names = list(rows)
        ends = [0.0] * len(rows)
        for index, part in enumerate(parts):
            lengths = [rows[name].get(part, 0.0) for name in names]
            axes.barh(names, lengths, left=ends, height=0.62, color=theme.colours[index], label=part)
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
        for name, end in zip(names, ends, strict=True):
            axes.annotate(f"{end:,.3g}", (end, name), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
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
