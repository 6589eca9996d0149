"""Tables for the terminal and as Markdown, and the formatting of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: shown above the table, in the terminal below.
        heading: names of the columns.
        rows: cells; the first column is left-aligned, the others right-aligned.
    """

    title: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [self.heading, ["---"] + ["---:"] * (len(self.heading) - 1), *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{self.title}\n\n{table}\n"

    def show(self) -> None:
        """Print the table."""
        table = RichTable(box=SIMPLE, pad_edge=False)
        for index, name in enumerate(self.heading):
            table.add_column(name, justify="right" if index else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        # as wide as the numbers need: wrapped lines are readable, truncated numbers are not
        console = Console()
        width = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
        Console(width=max(console.width, width)).print(table)
        console.print(self.title, highlight=False, markup=False)


def cost_cells(network: Mapping[str, Any]) -> list[str]:
    """Return the parameters and multiply-accumulates of a network as table cells."""
    return [f"{network['parameters']:,}", f"{network['macs'] / 1e6:,.1f} M"]


def percent(accuracy: float, interval: float | None = None) -> str:
    """Format a fraction as percent, with the half-width of its interval."""
    return f"{accuracy:.1%}" + ("" if interval is None else f" ± {interval:.1%}")


def quantity(value: float) -> str:
    """Format a number with an SI prefix: 2.5e12 -> "2.5 T"."""
    if round(value) < 1000:
        return f"{value:.0f} "
    for prefix in "kMGTP":
        value /= 1000
        if round(value, 1) < 1000:
            return f"{value:.1f} {prefix}"
    return f"{value / 1000:,.1f} E"


def duration(seconds: float) -> str:
    """Format seconds: 5400 -> "1.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36_000 else f"{seconds / 3600:,.0f} h"
