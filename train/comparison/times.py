"""What runs took: the seconds that they recorded, divided as the timed parts of a step are to each other.

OUT/measured/NAME.json   what a step of that run takes, in parts (train/comparison/measuring.py)
"""

from __future__ import annotations

import contextlib
import json
import statistics
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from dspnet_fast import atomic

from ..costs import counting
from ..run import fingerprint
from ..run.log import read_metrics
from .design import Comparison, Variant
from .measuring import Measured, measure
from .seeds import summary

MEASURED = "measured"
OF_MACHINE = ("workers", "log_steps", "probe_epochs", "probe_images", "checkpoint_epochs", "max_bad_images")


def timed_step(comparison: Comparison, variant: Variant) -> Measured:
    """The parts of a step, kept under what they depend on."""
    path = comparison.out / MEASURED / f"{variant.name}.json"
    config, steps = variant.config, comparison.options.timed_steps
    relevant = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in OF_MACHINE}
    key = fingerprint.digest(sorted(relevant.items()), steps)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or damaged: it is measured anew
        kept = json.loads(path.read_text())
        if kept.pop("key") == key:
            return Measured(**kept)
    print(f"timing the parts of a step: {variant.label}", flush=True)
    found = measure(config, steps)
    atomic.write_text(path, json.dumps({"key": key, **asdict(found)}, indent=2) + "\n")
    return found


def taken(comparison: Comparison, variant: Variant, found: Measured) -> dict[str, Any]:
    """Seconds of training of every seed's run, and their mean in parts.

    The wait for data is what the runs recorded. What remains is divided as the timed parts of a step, times the steps
    that each was taken in, are to each other.
    """
    sampled = counting.sampled_steps(variant.config, comparison.epoch_steps)
    timed = {
        "target": comparison.steps * found.target,
        "online": sum(steps * found.online[dn] for dn, steps in sampled.items()),
        "optimizer": comparison.steps * found.optimizer,
    }
    batch_size = comparison.recipe.batch_size
    recorded = {seed: seconds_of(comparison.place(variant, seed), batch_size) for seed in comparison.seeds}
    seconds = summary([total for total, _ in recorded.values()])
    data = statistics.fmean(waited for _, waited in recorded.values())
    scale = (seconds["mean"] - data) / sum(timed.values())
    return {
        "seconds": {**seconds, "seeds": {str(seed): total for seed, (total, _) in recorded.items()}},
        "parts": {**{part: scale * value for part, value in timed.items()}, "data": data},
        "timed_step": {"target": found.target, "online": found.online, "optimizer": found.optimizer},
        "explained": 1 / scale,
        "peak_memory": found.peak_memory,
    }


def seconds_of(out: Path, batch_size: int) -> tuple[float, float]:
    """Seconds of training of a run, and of them those that it waited for data, from its metrics.

    Measurements and checkpoints do not count, nor does what was done twice after a crash.
    """
    total = waited = 0.0
    before = 0
    for line in read_metrics(out):
        if "images_per_second" in line:
            took = (line["step"] - before) * batch_size / line["images_per_second"]
            total += took
            waited += took * line["data_wait"]
            before = line["step"]
    return total, waited
