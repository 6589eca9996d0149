"""What a family costs in shares of what separate runs do, by parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SEPARATE, SINGLE_PROCESS = "separate runs", "alone"  # all networks one after another, each of them


def ratios(runs: Mapping[str, Any]) -> dict[str, Any]:
    """What runs cost in shares of all separate runs, and of the largest network alone.

    {reference: {run: {"measured" and "counted": {"total", and its parts, which add up to it}}}}; a run may be
    `SEPARATE`, and "measured" has "seeds", the total's of each, where both were run. "peak_memory" is the ratio of
    peaks: separate runs, which follow each other, have that of the largest of them.
    """
    alone = {name: run for name, run in runs.items() if run["subnets_per_step"] is None}
    largest = list(alone)[-1]
    rows = {SEPARATE: list(alone.values()), largest: [alone[largest]]}
    references = dict(rows)
    rows |= {name: [run] for name, run in runs.items() if name not in alone}
    found: dict[str, Any] = {}
    for reference, base in references.items():
        found[reference] = {}
        for row, of in rows.items():
            found[reference][row] = {"counted": _shares(_counted(of), sum(_counted(base).values()))}
            if all("measured" in run for run in (*of, *base)):
                seconds, base_seconds = _seconds_by_seed(of), _seconds_by_seed(base)
                found[reference][row]["measured"] = {
                    **_shares(_parts(of), sum(_parts(base).values())),
                    "seeds": {seed: seconds[seed] / base_seconds[seed] for seed in seconds},
                }
                peaks = [_peak(of), _peak(base)]
                if None not in peaks:
                    found[reference][row]["peak_memory"] = peaks[0] / peaks[1]
    return found


def _counted(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {part: sum(run["counted"][part] for run in runs) for part in ("target", "online", "optimizer")}


def _parts(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {part: sum(run["measured"]["parts"][part] for run in runs) for part in runs[0]["measured"]["parts"]}


def _seconds_by_seed(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    seeds = runs[0]["measured"]["seconds"]["seeds"]
    return {seed: sum(run["measured"]["seconds"]["seeds"][seed] for run in runs) for seed in seeds}


def _peak(runs: Sequence[Mapping[str, Any]]) -> Any:
    peaks = [run["measured"]["peak_memory"] for run in runs]
    return None if None in peaks else max(peaks)


def _shares(parts: Mapping[str, float], whole: float) -> dict[str, float]:
    return {"total": sum(parts.values()) / whole, **{part: value / whole for part, value in parts.items()}}
