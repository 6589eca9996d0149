"""Networks as points of a figure: what they cost, and their accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Point(NamedTuple):
    """A network: what it costs for an image, its accuracy and half the width of its 95 % interval, from 0 to 1."""

    name: str
    macs: float
    parameters: float
    accuracy: float
    interval: float


def points(networks: Mapping[str, Mapping[str, Any]], column: str, accuracy: str = "top1") -> list[Point]:
    """One series of the figure: a column of a report's networks."""
    return [
        Point(name, network["macs"], network["parameters"], network[column][accuracy], network[column]["interval"])
        for name, network in networks.items()
    ]
