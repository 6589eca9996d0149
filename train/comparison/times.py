"""Training times of runs: recorded seconds, divided in proportion to the timed parts of a step.

OUT/measured/NAME.json   times of the parts of a step (train/comparison/measuring.py)
"""

from __future__ import annotations

import contextlib
import json
import statistics
from dataclasses import asdict, fields
from typing import Any

from dspnet_fast import atomic

from ..costs import flops
from ..run import fingerprint
from ..run.log import training_seconds
from ..selection.kernels import Kernels
from .design import Comparison, Variant
from .measuring import StepMeasurement, measure_step
from .seeds import mean_and_range

MEASURED = "measured"
UNRELATED_OPTIONS = ("workers", "log_steps", "probe_epochs", "probe_images", "checkpoint_epochs", "max_bad_images")


def timed_step(comparison: Comparison, variant: Variant, kernels: Kernels | None) -> StepMeasurement:
    """Time a step of a variant, or load the saved measurement of the same configuration."""
    path = comparison.out / MEASURED / f"{variant.name}.json"
    config, steps = variant.config, comparison.options.timed_steps
    relevant = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in UNRELATED_OPTIONS}
    key = fingerprint.digest(sorted(relevant.items()), steps, kernels and kernels.formulation)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # missing or damaged: measured again
        saved = json.loads(path.read_text())
        if saved.pop("key") == key:
            return StepMeasurement(**saved)
    print(f"timing the parts of a step: {variant.label}", flush=True)
    found = measure_step(config, steps, kernels)
    atomic.write_text(path, json.dumps({"key": key, **asdict(found)}, indent=2) + "\n")
    return found


def run_times(comparison: Comparison, variant: Variant, found: StepMeasurement) -> dict[str, Any]:
    """Training times of a variant: seconds of every seed's run, and their mean divided into parts.

    The wait for data is recorded by the runs. The rest is divided in proportion to the timed parts of a step,
    multiplied by the number of steps that contain each part.
    """
    sampled = flops.expected_steps(variant.config, comparison.epoch_steps)
    timed = {
        "target": comparison.steps * found.target,
        "online": sum(steps * found.online[dn] for dn, steps in sampled.items()),
        "optimizer": comparison.steps * found.optimizer,
        **({"teacher": comparison.steps * found.teacher} if variant.config.teacher is not None else {}),
    }
    batch_size = comparison.config.batch_size
    recorded = {
        seed: training_seconds(comparison.run_directory(variant, seed), batch_size) for seed in comparison.seeds
    }
    seconds = mean_and_range([total for total, _ in recorded.values()])
    data = statistics.fmean(waited for _, waited in recorded.values())
    scale = (seconds["mean"] - data) / sum(timed.values())
    return {
        "seconds": {**seconds, "seeds": {str(seed): total for seed, (total, _) in recorded.items()}},
        "parts": {**{part: scale * value for part, value in timed.items()}, "data": data},
        "timed_step": {
            "target": found.target,
            "online": found.online,
            "optimizer": found.optimizer,
            "teacher": found.teacher,
        },
        "timed_over_recorded": 1 / scale,
        "peak_memory": found.peak_memory,
    }
