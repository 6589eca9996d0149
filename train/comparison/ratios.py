"""Ratios of the costs of a family to those of separate runs, by parts of a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SEPARATE, ALONE = "separate runs", "alone"  # all networks one after another; each network
PARTS = ("target", "online", "optimizer", "teacher", "data")  # of the cost of a run, counted or measured


def ratios(runs: Mapping[str, Any]) -> dict[str, Any]:
    """Ratios of the costs of runs to those of all separate runs, and to those of the largest network alone.

    Args:
        runs: "runs" of a report.

    Returns:
        {reference: {run: {"counted": ratios, "measured": ratios, "peak_memory": ratio}}}. Ratios are "total" and its
        parts, which add up to it; measured ones have "seeds", the total of each seed. Values of runs that were not
        trained are missing. A run or reference may be `SEPARATE`, whose peak memory is the largest of its runs.
    """
    alone = {name: run for name, run in runs.items() if run["subnets_per_step"] is None}
    largest = list(alone)[-1]
    counted = part_names(run["counted"] for run in runs.values())
    measured = part_names(run["measured"]["parts"] for run in runs.values() if "measured" in run)
    rows = {SEPARATE: list(alone.values()), largest: [alone[largest]]}
    references = dict(rows)
    rows |= {name: [run] for name, run in runs.items() if name not in alone}
    found: dict[str, Any] = {}
    for reference, base in references.items():
        found[reference] = {}
        for row, of in rows.items():
            costs, whole = ([run["counted"] for run in group] for group in (of, base))
            found[reference][row] = {"counted": _ratios(costs, whole, counted)}
            if all("measured" in run for run in (*of, *base)):
                costs, whole = ([run["measured"]["parts"] for run in group] for group in (of, base))
                seconds, base_seconds = _seconds_by_seed(of), _seconds_by_seed(base)
                found[reference][row]["measured"] = {
                    **_ratios(costs, whole, measured),
                    "seeds": {seed: seconds[seed] / base_seconds[seed] for seed in seconds},
                }
                peaks = [_peak(of), _peak(base)]
                if None not in peaks:
                    found[reference][row]["peak_memory"] = peaks[0] / peaks[1]
    return found


def part_names(costs: Iterable[Mapping[str, Any]]) -> list[str]:
    """The parts that any of these costs of runs has, in the order of `PARTS`."""
    present = {part for cost in costs for part in cost}
    return [part for part in PARTS if part in present]


def _seconds_by_seed(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    seeds = runs[0]["measured"]["seconds"]["seeds"]
    return {seed: sum(run["measured"]["seconds"]["seeds"][seed] for run in runs) for seed in seeds}


def _peak(runs: Sequence[Mapping[str, Any]]) -> Any:
    peaks = [run["measured"]["peak_memory"] for run in runs]
    return None if None in peaks else max(peaks)


def _ratios(
    costs: Sequence[Mapping[str, float]], whole: Sequence[Mapping[str, float]], parts: Sequence[str]
) -> dict[str, float]:
    total = sum(cost.get(part, 0.0) for cost in whole for part in parts)
    shares = {part: sum(cost.get(part, 0.0) for cost in costs) / total for part in parts}
    return {"total": sum(shares.values()), **shares}
