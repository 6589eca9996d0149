"""Tables and figures of compare.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..evaluation import drawing
from ..evaluation.plot_data import Point
from ..evaluation.results import Report
from ..reporting import figures
from ..run.tables import Table, cost_cells, percent, quantity
from .curves import MEASURES
from .ratios import ALONE, SEPARATE, part_names

PART_LABELS = {
    "target": "target forward",
    "online": "online subnets",
    "optimizer": "optimizer",
    "teacher": "teacher forward",
    "data": "data wait",
}
MIB = 2**20


def tables_of(report: Report) -> list[Table]:
    """Tables of accuracies, measured costs, counted costs and ratios."""
    tables = [_accuracy(report, protocol) for protocol in report["accuracy"]]
    if any("measured" in run for run in report["runs"].values()):
        tables.append(_measured(report))
    return [*tables, _counted(report), *(_ratios(report, reference) for reference in report["ratios"])]


def _accuracy(report: Report, protocol: str) -> Table:
    columns = report["accuracy"][protocol]
    alone = columns.get(ALONE)
    families = [name for name in columns if name != ALONE]
    heading = ["network", "params", "MACs", *(_label(report, name) for name in columns)]
    heading += [f"{_label(report, name)}: difference" for name in families] if alone else []
    rows = []
    for dn, network in report["networks"].items():
        row = [dn, *cost_cells(network), *(_score(scores.get(dn)) for scores in columns.values())]
        if alone:
            row += [_difference(columns[name][dn], alone.get(dn)) for name in families]
        rows.append(row)
    seeds = report["seeds"]
    title = (
        f"{protocol} accuracy on {report['data']}, {report['test_images']:,} test images, of networks pretrained alone "
        f"and in a family, {report['steps']:,} steps each. "
    )
    if len(seeds) == 1:
        title += f"Seed {seeds[0]}; ± is the half-width of the 95 % interval over test images."
        title += " It does not cover other seeds."
    else:
        title += (
            f"Means of seeds {', '.join(map(str, seeds))}; ± is the half-width of the 95 % interval for the test "
            "images of one seed; brackets: range over the seeds."
        )
    return Table(title, heading, rows)


def _difference(score: Mapping[str, Any], alone: Mapping[str, Any] | None) -> str:
    return "–" if alone is None else f"{100 * (score['mean'] - alone['mean']):+.1f} points"


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "–"
    text = percent(score["mean"], score["interval"])
    return text if len(score["seeds"]) == 1 else f"{text} [{percent(score['low'])}, {percent(score['high'])}]"


def _label(report: Report, name: str) -> str:
    return report["runs"][name]["label"] if name in report["runs"] else name


def _measured(report: Report) -> Table:
    parts = part_names(run["measured"]["parts"] for run in report["runs"].values() if "measured" in run)
    heading = ["run", "seconds", *(PART_LABELS[part] for part in parts), "peak memory"]
    rows = []
    for run in report["runs"].values():
        if "measured" in run:
            found = run["measured"]
            seconds = found["seconds"]
            total = f"{seconds['mean']:,.1f}"
            if len(report["seeds"]) > 1:
                total += f" [{seconds['low']:,.1f}, {seconds['high']:,.1f}]"
            peak = found["peak_memory"]
            memory = "–" if peak is None else f"{peak / MIB:,.0f} MiB"
            seconds_of = [f"{found['parts'].get(part, 0.0):,.1f}" for part in parts]
            rows.append([run["label"], total, *seconds_of, memory])
    title = (
        "Seconds of training without probes and checkpoints, divided among the parts of a step in proportion to their "
        "separately timed durations; peak memory of a step."
    )
    return Table(title, heading, rows)


def _counted(report: Report) -> Table:
    names = part_names(run["counted"] for run in report["runs"].values())
    heading = ["run", "MACs", *(PART_LABELS[part] for part in names)]
    rows = []
    for run in report["runs"].values():
        parts = [run["counted"].get(part, 0.0) for part in names]
        rows.append([run["label"], *(f"{quantity(value)}MAC" for value in (sum(parts), *parts))])
    views = next(iter(report["runs"].values()))["counted"]["views"]
    title = (
        f"Multiply-accumulates of {report['steps']:,} steps with {views:,} views of {report['data']}; a backward pass "
        "counts as two forward passes."
    )
    return Table(title, heading, rows)


def _ratios(report: Report, reference: str) -> Table:
    rows_of = report["ratios"][reference]
    measured = part_names(row["measured"] for row in rows_of.values() if "measured" in row)
    counted = part_names(row["counted"] for row in rows_of.values())
    heading = ["run", *(["time", *(PART_LABELS[part] for part in measured), "peak memory"] if measured else [])]
    heading += ["MACs", *(f"{part} MACs" for part in counted)]
    rows = []
    for name, row in rows_of.items():
        cells = [_row_label(report, name)]
        if measured:
            found = row.get("measured")
            cells += [f"{found[part]:.3f}" if found else "–" for part in ("total", *measured)]
            cells.append(f"{row['peak_memory']:.3f}" if "peak_memory" in row else "–")
        cells += [f"{row['counted'][part]:.3f}" for part in ("total", *counted)]
        rows.append(cells)
    if measured and len(report["seeds"]) > 1:
        for cells, row in zip(rows, rows_of.values(), strict=True):
            if "measured" in row and len(set(row["measured"]["seeds"].values())) > 1:
                values = row["measured"]["seeds"].values()
                cells[1] += f" [{min(values):.3f}, {max(values):.3f}]"
    what = "all separate runs together" if reference == SEPARATE else _row_label(report, reference)
    return Table(f"Ratios to {what}. The parts add up to the time and to the MACs.", heading, rows)


def _row_label(report: Report, row: str) -> str:
    """Label of a row of ratios."""
    return "separate runs together" if row == SEPARATE else _label(report, row)


def figures_of(report: Report) -> Iterator[tuple[str, drawing.Draw, str, str]]:
    """(name, figure, description, caption) of each figure of a report."""
    for protocol, columns in report["accuracy"].items():
        series = {_label(report, name): _points(report, scores) for name, scores in columns.items()}
        label = f"{protocol} accuracy on {report['data']}"
        caption = f"{label}: the same networks pretrained alone and in a family. Bars: 95 % intervals"
        if len(report["seeds"]) > 1:
            caption += ", extended to the range over the seeds if that is larger"
        yield (
            f"accuracy-{protocol.lower()}",
            drawing.accuracy_figure(series, {}, f"{protocol} accuracy", "macs"),
            f"{label} of networks pretrained alone and in a family, over multiply-accumulates",
            f"{caption}.",
        )
    largest = list(report["networks"])[-1]
    for measure, curves in report.get("curves", {}).items():  # missing in files of 0.1.0
        caption = f"{MEASURES[measure][0].upper()}{MEASURES[measure][1:]} of {largest} while training"
        several = len(report["seeds"]) > 1
        caption += ": means of the seeds, and bands from the lowest to the highest." if several else "."
        lines = {_label(report, name): curve for name, curve in curves.items()}
        draw = figures.bands(lines, MEASURES[measure], percent=measure == "knn")
        yield f"curves-{measure}", draw, f"{MEASURES[measure]} of {largest} over epochs, by run", caption
    for kind, unit, of in (
        ("measured", "seconds of training", 1.0),
        ("counted", "multiply-accumulates, trillions", 1e12),
    ):
        if rows := _bars(report, kind, of):
            caption = f"{unit[0].upper()}{unit[1:]}, {kind}."
            yield f"cost-{kind}", figures.bars(rows, unit), f"{unit} of every run, by parts", caption


def _bars(report: Report, kind: str, unit: float) -> dict[str, dict[str, float]]:
    """Costs by part of all separate runs together, if all were trained, and of every run."""
    rows: dict[str, dict[str, float]] = {}
    alone: list[dict[str, float]] = []
    for run in report["runs"].values():
        if kind not in run:
            continue
        parts = run[kind]["parts"] if kind == "measured" else run[kind]
        row = {label: parts[part] / unit for part, label in PART_LABELS.items() if part in parts}
        rows[run["label"]] = row
        if run["subnets_per_step"] is None:
            alone.append(row)
    if len(alone) < len(report["networks"]):
        return rows
    return {SEPARATE: {part: sum(row[part] for row in alone) for part in alone[0]}} | rows


def _points(report: Report, scores: Mapping[str, Any]) -> list[Point]:
    points = []
    for dn, score in scores.items():
        network = report["networks"][dn]
        half = max(score["interval"], score["high"] - score["mean"], score["mean"] - score["low"])
        points.append(Point(dn, network["macs"], network["parameters"], score["mean"], half))
    return points
