"""Points of figures: cost and accuracy of networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Point(NamedTuple):
    """A network's cost per image, accuracy from 0 to 1, and half-width of the accuracy's 95 % interval."""

    name: str
    macs: float
    parameters: float
    accuracy: float
    interval: float


def points(networks: Mapping[str, Mapping[str, Any]], column: str, accuracy: str = "top1") -> list[Point]:
    """Points of a column of a report.

    Args:
        networks: networks of the report.
        column: key of the result in each network.
        accuracy: key of the accuracy in each result.
    """
    return [
        Point(name, network["macs"], network["parameters"], network[column][accuracy], network[column]["interval"])
        for name, network in networks.items()
    ]
