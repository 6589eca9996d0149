"""Peak memory of a training step, from the profiler's record of every allocation on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch

MIB = 2**20
WARMUP_STEPS = 2
MEASURED = "the step measured"


def peak_of_step(build: Callable[[], Callable[[], object]]) -> int:
    """Peak bytes of live tensors during the third call of the step that `build` returns.

    The profiler records every CPU allocation, including those that `build` and earlier steps keep.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step = build()
        for _ in range(WARMUP_STEPS):
            step()
        with torch.profiler.record_function(MEASURED):
            step()
    events = profile.profiler.kineto_results.events()
    began = next(event.start_ns() for event in events if event.name() == MEASURED)
    allocations = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for when, size in allocations:
        live += size
        if when >= began:
            peak = max(peak, live)
    return peak


def in_own_process(module: str, arguments: Sequence[str]) -> dict[str, float]:
    """JSON that `python -m module arguments` prints; RuntimeError with its stderr if it fails."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"python -m {module} {' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout)
