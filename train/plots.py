"""Figures of results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

BLUE, GREY = "#2563a8", "#8a8f98"


def accuracy_over_macs(report: dict[str, Any], path: Path) -> None:
    """Plot kNN accuracy with its 95 % interval over multiply-accumulates, one point for each network, as a PNG."""
    import matplotlib  # here: a second of import that training does not need

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    networks = sorted(report["networks"].items(), key=lambda item: item[1]["macs"])
    macs = [network["macs"] / 1e6 for _, network in networks]
    for state, colour in (("pretrained", BLUE), ("untrained", GREY)):
        if state in networks[0][1]:
            accuracies = [100 * network[state]["majority"] for _, network in networks]
            errors = [100 * network[state]["interval"] for _, network in networks]
            axes.errorbar(macs, accuracies, errors, color=colour, marker="o", capsize=3, label=state)
    if "raw_pixels" in report:
        axes.axhline(100 * report["raw_pixels"]["majority"], color=GREY, linestyle="--", label="raw pixels")
    for (name, network), x in zip(networks, macs, strict=True):
        point = (x, 100 * network["pretrained"]["majority"])
        axes.annotate(name, point, textcoords="offset points", xytext=(6, 8), fontsize=9)
    axes.margins(x=0.18, y=0.15)
    axes.set_xlabel("multiply-accumulates per image, millions")
    axes.set_ylabel(f"kNN accuracy on {report['data']}, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
    os.replace(temporary, path)
