"""Drawing, for a light and a dark page, as PNG; and the figure of every evaluation: accuracy over cost."""

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

DPI = 150
LOGARITHMIC = 8  # a wider range of costs than this factor is drawn on a logarithmic axis
COSTS = {"macs": "multiply-accumulates per image", "parameters": "parameters"}


@dataclass(frozen=True)
class Theme:
    """Colours of a page, and the stretch of viridis whose colours stand out from it."""

    background: str
    text: str
    faint: str
    shades: tuple[float, float]
    colours: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1d2129", "#8a909c", (0.0, 0.82), ("#2563a8", "#c8551b", "#3b8a4b", "#7a4fa3", "#b0892b", "#2f8c94")
)
DARK = Theme(
    "#1a1d23", "#e6e8ec", "#868d9a", (0.28, 0.98), ("#6aa9ee", "#f08b55", "#72c285", "#b794e6", "#dcb65c", "#63c3cb")
)
THEMES = {"light": LIGHT, "dark": DARK}

Draw = Callable[[Theme], Figure]


def png(draw: Draw, theme: Theme = LIGHT) -> bytes:
    """The figure as PNG."""
    with rc_context(_style(theme)):
        file = io.BytesIO()
        draw(theme).savefig(file, dpi=DPI, format="png", metadata={"Software": None})
    return file.getvalue()


def render(draw: Draw) -> dict[str, bytes]:
    """The figure as PNG, by theme."""
    return {name: png(draw, theme) for name, theme in THEMES.items()}


def _style(theme: Theme) -> Any:  # matplotlib's type of it is the list of all keys
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


def accuracies(series: Mapping[str, Sequence[Point]], lines: Mapping[str, float], label: str, cost: str) -> Draw:
    """Accuracy over what networks cost.

    Args:
        series: networks by what was done to them; those of the first are named.
        lines: accuracies from 0 to 1 that belong to no network, drawn across.
        label: of the accuracies.
        cost: a key of COSTS.
    """

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(6.0, 3.8), layout="constrained")
        axes = figure.subplots()
        for index, (name, points) in enumerate(series.items()):
            points = sorted(points, key=lambda point: getattr(point, cost))
            x = [getattr(point, cost) / 1e6 for point in points]
            y, error = [100 * point.accuracy for point in points], [100 * point.interval for point in points]
            colour = theme.colours[index % len(theme.colours)]
            axes.errorbar(x, y, error, color=colour, marker="o", markersize=5, capsize=3, elinewidth=1, label=name)
            if index == 0:
                _name(axes, theme, [point.name for point in points], x, y, error)
        for index, (name, accuracy) in enumerate(lines.items()):
            style = ("--", ":", "-.")[index % 3]
            axes.axhline(100 * accuracy, color=theme.faint, linestyle=style, linewidth=1.2, zorder=0, label=name)
        costs = [getattr(point, cost) for points in series.values() for point in points]
        if max(costs) > LOGARITHMIC * min(costs):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.1, y=0.16)
        axes.set_xlabel(f"{COSTS[cost]}, millions")
        axes.set_ylabel(f"{label}, %")
        legend(figure, [*series, *lines])
        return figure

    return draw


def _name(
    axes: Axes, theme: Theme, names: Sequence[str], x: Sequence[float], y: Sequence[float], error: Sequence[float]
) -> None:
    """Names above and below the bars in turn, so that neighbours do not meet."""
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
            path_effects=[withStroke(linewidth=3, foreground=theme.background)],  # a line behind it stays legible
        )


def legend(figure: Figure, labels: Sequence[str]) -> None:
    """Above the axes, so that it covers no data; in the order of the labels."""
    handles = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    entry = 30 + 6 * max(map(len, labels))  # points that one takes
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="outside upper left",
        ncols=max(1, int(72 * figure.get_figwidth()) // entry),
        fontsize=9,
        handlelength=1.2,
        handletextpad=0.5,
        columnspacing=1.4,
        borderpad=0,
    )
