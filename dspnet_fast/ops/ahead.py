"""Compile Triton kernels ahead of a run: its launches are recorded on meta tensors and compiled by a pool of processes.

Compiled one after another, at their first launch, the kernels of a training step take minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import registry, triton

if TYPE_CHECKING:
    from dspnet_fast.kernels.ahead import Launch

MAX_PROCESSES = 32  # each takes about 300 MB
REPORT_SECONDS = 5.0


def record(run: Callable[[], object]) -> list[Launch]:
    """The distinct launches of a function that computes on meta tensors, without launching.

    Shapes, dtypes and policy must be those of the run: they decide tile sizes and integer widths.
    """
    launch: Any = triton.kernels("launch")
    of = triton.kernels("ahead").Launch.of
    found: dict[Launch, None] = {}
    with launch.observed(lambda *observed: found.setdefault(of(*observed))), registry.triton_on_meta():
        run()
    return list(found)


def compile_launches(
    launches: Sequence[Launch],
    capability: tuple[int, int],
    report: Callable[[str], object],
    processes: int | None = None,
) -> list[dict[str, Any]]:
    """Compile launches into Triton's cache. Failures are reported: such kernels are compiled at their first launch.

    Args:
        launches: from `record`.
        capability: compute capability of the GPU.
        report: called with lines about the progress.
        processes: number of processes [one per core].

    Returns:
        {"kernel", "seconds"} of each, with "error" for failures.
    """
    if not launches:
        return []
    processes = min(processes or len(os.sched_getaffinity(0)), MAX_PROCESSES, len(launches))
    major, minor = capability
    command = [sys.executable, "-m", "dspnet_fast.kernels.ahead", f"{major}{minor}", str(processes)]
    results: list[dict[str, Any]] = []
    began = reported = time.monotonic()
    report(f"compiling {len(launches)} kernels, {processes} processes")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.writelines(f"{launch.json()}\n" for launch in launches)
        child.stdin.close()
        for line in child.stdout:
            results.append(json.loads(line))
            if time.monotonic() > reported + REPORT_SECONDS and len(results) < len(launches):
                reported = time.monotonic()
                report(f"compiling {len(results) + 1} of {len(launches)} kernels, {processes} processes")
    errors = [f"{result['kernel']}: {result['error']}" for result in results if "error" in result]
    if child.returncode:
        errors.append(f"the compiling process ended with exit code {child.returncode}")
    compiled = sum("error" not in result for result in results)
    report(f"compiled {compiled} of {len(launches)} kernels in {time.monotonic() - began:.0f} s")
    for error in errors:
        report(f"not compiled: {error}")
    return results
