"""Reports of evaluations: written as JSON, Markdown and a figure, and printed as a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dspnet_fast import atomic

from ..run.tables import Table, cost_cells, percent
from .plot_data import Point

Report = dict[str, Any]


def accuracy_table(title: str, networks: Mapping[str, Mapping[str, Any]], columns: Iterable[str]) -> Table:
    """Table of networks with their costs, and top-1 and top-5 accuracy for each of `columns`, such as "linear"."""
    columns = list(columns)
    scores = [heading for column in columns for heading in (column, "top 5")]
    rows = []
    for name, network in networks.items():
        cells = [name, *cost_cells(network)]
        for column in columns:
            cells += [percent(network[column]["top1"], network[column]["interval"]), percent(network[column]["top5"])]
        rows.append(cells)
    return Table(f"{title}. ± is the half-width of the 95 % interval.", ["network", "params", "MACs", *scores], rows)


def origin_of(report: Report) -> str:
    """The evaluated weights, as the end of a title."""
    if "weights" in report:
        return f"weights of {report['weights']} at {report['image_size']} px"
    return f"after {report['step']:,} steps"


def publish(
    folder: Path,
    name: str,
    report: Report,
    table: Table,
    label: str,
    series: Mapping[str, Sequence[Point]],
    lines: Mapping[str, float] | None = None,
) -> None:
    """Write NAME.json, NAME.md and the figure NAME.png, and print the table.

    Args:
        folder: folder of the files.
        name: name of the files without suffix.
        report: content of NAME.json; a "network_part", or the name of a published network, is part of the name.
        table: content of NAME.md.
        label: label of the figure's accuracy axis.
        series: points of the figure.
        lines: accuracies from 0 to 1, drawn as horizontal lines.
    """
    published = next(iter(report["networks"])) if "weights" in report else None
    name = "-".join(filter(None, (name, report.get("network_part"), published)))
    from . import drawing  # not at the top: importing matplotlib takes a second that training saves

    atomic.write_text(folder / f"{name}.json", json.dumps(report, indent=2) + "\n")
    atomic.write_text(folder / f"{name}.md", table.markdown())
    atomic.write_bytes(folder / f"{name}.png", drawing.png(drawing.accuracy_figure(series, lines or {}, label, "macs")))
    table.show()
    print(f"{folder}/{name}.json, {name}.md, {name}.png")
