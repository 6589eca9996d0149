"""Tables on the screen and as Markdown, and numbers as they are written in them."""

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
