"""What evaluations give: costs of networks, one report as JSON, Markdown, a table on the screen and a figure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable

from dspnet_fast.cost import mac_count, parameter_count
from dspnet_fast.models import build
from dspnet_fast.slim import slim
from dspnet_fast.subnets import Subnet

from ..config import FamilyOptions
from ..run import atomic

Report = dict[str, Any]


class Point(NamedTuple):
    """A network: what it costs for an image, its accuracy and half the width of its 95 % interval, from 0 to 1."""

    name: str
    macs: float
    parameters: float
    accuracy: float
    interval: float


@dataclass(frozen=True)
class Cost:
    """Of one network: parameters, multiply-accumulates for one image, features, all without a classifier."""

    parameters: int
    macs: int
    features: int


def cost(options: FamilyOptions, subnet: Subnet, image_size: int) -> Cost:
    """What a network of a family costs, from its description alone."""
    with torch.device("meta"):
        network = slim(build(options.network, subnet, options.stem), None)
    return Cost(parameter_count(network), mac_count(network, image_size), subnet.channels[-1])


@dataclass(frozen=True)
class Table:
    """A title and rows of text; the first column names what the others are about."""

    title: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As a page."""
        lines = [self.heading, ["---"] + ["---:"] * (len(self.heading) - 1), *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{self.title}\n\n{table}\n"

    def show(self) -> None:
        """On the screen."""
        table = RichTable(box=SIMPLE, pad_edge=False, caption=self.title, caption_justify="left")
        for index, name in enumerate(self.heading):
            table.add_column(name, justify="right" if index else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        # never narrower than the numbers: a line that wraps can be read, one that is cut off cannot
        console = Console()
        width = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
        Console(width=max(console.width, width)).print(table)


def accuracy_table(title: str, networks: Mapping[str, Mapping[str, Any]], columns: Iterable[str]) -> Table:
    """Networks with their costs and, of every column ("linear", "1 % fine-tuned", ...), top-1 and top-5 accuracy."""
    columns = list(columns)
    scores = [heading for column in columns for heading in (column, "top 5")]
    rows = []
    for name, network in networks.items():
        cells = [name, *cost_cells(network)]
        for column in columns:
            cells += [percent(network[column]["top1"], network[column]["interval"]), percent(network[column]["top5"])]
        rows.append(cells)
    return Table(f"{title}. ± is half the 95 % interval.", ["network", "params", "MACs", *scores], rows)


def cost_cells(network: Mapping[str, Any]) -> list[str]:
    """Parameters and multiply-accumulates of a network of a report, as text."""
    return [f"{network['parameters']:,}", f"{network['macs'] / 1e6:,.1f} M"]


def percent(accuracy: float, interval: float | None = None) -> str:
    """A share from 0 to 1 in percent, with half its interval."""
    return f"{accuracy:.1%}" + ("" if interval is None else f" ± {interval:.1%}")


def quantity(value: float) -> str:
    """A number with a prefix of a thousand's power: 2.5e12 -> "2.5 T"."""
    if round(value) < 1000:
        return f"{value:.0f} "
    for prefix in "kMGTP":
        value /= 1000
        if round(value, 1) < 1000:
            return f"{value:.1f} {prefix}"
    return f"{value / 1000:,.1f} E"


def points(networks: Mapping[str, Mapping[str, Any]], column: str, accuracy: str = "top1") -> list[Point]:
    """One series of the figure: a column of a report's networks."""
    return [
        Point(name, network["macs"], network["parameters"], network[column][accuracy], network[column]["interval"])
        for name, network in networks.items()
    ]


def publish(
    folder: Path,
    name: str,
    report: Report,
    table: Table,
    label: str,
    series: Mapping[str, Sequence[Point]],
    lines: Mapping[str, float] | None = None,
) -> None:
    """Write NAME.json, NAME.md and the figure NAME.png into the folder, and print the table.

    Args:
        label: of the figure's accuracies.
        series: points of the figure.
        lines: accuracies from 0 to 1 to draw across it.
    """
    from . import drawing  # here: matplotlib is a second of import that training does not need

    atomic.write_text(folder / f"{name}.json", json.dumps(report, indent=2) + "\n")
    atomic.write_text(folder / f"{name}.md", table.markdown())
    atomic.write_bytes(folder / f"{name}.png", drawing.png(drawing.accuracies(series, lines or {}, label, "macs")))
    table.show()
    print(f"{folder}/{name}.json, {name}.md, {name}.png")
