"""Figures as PNG for light and dark pages; the figure of accuracy over cost of every evaluation."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from .plot_data import Point

DPI = 190
WIDTH = 4.8  # inches; on a page of 400 px, text of 10 points has 11 px
LOG_AXIS_RATIO = 8  # the cost axis is logarithmic if the largest cost exceeds the smallest by this factor
COSTS = {"macs": "multiply-accumulates per image", "parameters": "parameters"}


@dataclass(frozen=True)
class Theme:
    """Colours of a page."""

    background: str
    text: str
    faint: str
    colours: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1d2129", "#8a909c", ("#2563a8", "#c8551b", "#3b8a4b", "#7a4fa3", "#b0892b", "#2f8c94"))
DARK = Theme("#1a1d23", "#e6e8ec", "#868d9a", ("#6aa9ee", "#f08b55", "#72c285", "#b794e6", "#dcb65c", "#63c3cb"))
THEMES = {"light": LIGHT, "dark": DARK}

Draw = Callable[[Theme], Figure]


def png(draw: Draw, theme: Theme = LIGHT) -> bytes:
    """Draw a figure as PNG."""
    with rc_context(_style(theme)):
        file = io.BytesIO()
        draw(theme).savefig(file, dpi=DPI, format="png", metadata={"Software": None})
    return file.getvalue()


def render(draw: Draw) -> dict[str, bytes]:
    """Draw a figure as PNG in every theme."""
    return {name: png(draw, theme) for name, theme in THEMES.items()}


def _style(theme: Theme) -> Any:  # matplotlib types its keys as a literal of all names
    colours = ("axes.labelcolor", "text.color", "xtick.labelcolor", "ytick.labelcolor", "legend.labelcolor")
    lines = ("axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    return {
        **dict.fromkeys(colours, theme.text),
        **dict.fromkeys(lines, theme.faint),
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "font.size": 10,
        "lines.linewidth": 1.6,
        "lines.solid_capstyle": "round",
    }


def accuracy_figure(series: Mapping[str, Sequence[Point]], lines: Mapping[str, float], label: str, cost: str) -> Draw:
    """Figure of accuracy over cost.

    Args:
        series: points of the networks by series name; the names of the longest series' points are written.
        lines: accuracies from 0 to 1 without a network, drawn as horizontal lines.
        label: label of the accuracy axis.
        cost: key of `COSTS`.
    """

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        axes = figure.subplots()
        longest = max(series, key=lambda name: len(series[name]))
        for index, (name, points) in enumerate(series.items()):
            points = sorted(points, key=lambda point: getattr(point, cost))
            x = [getattr(point, cost) / 1e6 for point in points]
            y, error = [100 * point.accuracy for point in points], [100 * point.interval for point in points]
            colour = theme.colours[index % len(theme.colours)]
            axes.errorbar(x, y, error, color=colour, marker="o", markersize=5, capsize=3, elinewidth=1, label=name)
            if name == longest:
                _annotate(axes, theme, [point.name for point in points], x, y, error)
        for index, (name, accuracy) in enumerate(lines.items()):
            style = ("--", ":", "-.")[index % 3]
            axes.axhline(100 * accuracy, color=theme.faint, linestyle=style, linewidth=1.2, zorder=0, label=name)
        costs = [getattr(point, cost) for points in series.values() for point in points]
        if max(costs) > LOG_AXIS_RATIO * min(costs):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.1, y=0.16)
        axes.set_xlabel(f"{COSTS[cost]}, millions")
        axes.set_ylabel(f"{label}, %")
        if len(series) + len(lines) > 1:
            legend(figure, [*series, *lines])
        return figure

    return draw


def _annotate(
    axes: Axes, theme: Theme, names: Sequence[str], x: Sequence[float], y: Sequence[float], error: Sequence[float]
) -> None:
    """Write names alternately above and below the points, so that neighbours do not overlap."""
    for index, (name, across, centre, half) in enumerate(zip(names, x, y, error, strict=True)):
        sign = -1 if index % 2 else 1
        axes.annotate(
            name,
            (across, centre + sign * half),
            (0, 5 * sign),
            textcoords="offset points",
            ha="center",
            va="bottom" if sign > 0 else "top",
            fontsize=8.5,
            path_effects=[withStroke(linewidth=3, foreground=theme.background)],  # keeps the name legible over a line
        )


def legend(figure: Figure, labels: Sequence[str]) -> None:
    """Add a legend above the axes, with the entries in the order of `labels`, row by row."""
    handles = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    entry = 30 + 6 * max(map(len, labels))  # width in points
    columns = min(len(labels), max(1, int(72 * figure.get_figwidth()) // entry))
    by_column = [label for column in range(columns) for label in labels[column::columns]]
    figure.legend(
        [handles[label] for label in by_column],
        by_column,
        loc="outside upper left",
        ncols=columns,
        fontsize=9,
        handlelength=1.2,
        handletextpad=0.5,
        columnspacing=1.4,
        borderpad=0,
    )
