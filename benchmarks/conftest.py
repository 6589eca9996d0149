"""`pytest benchmarks/ --benchmark-only`: time each operator's providers beside the alternatives, correct ones only.

Before an operator is timed its tests run; where they fail, nothing is timed. Every line of the summary says what share
of the machine's limit was reached, and the limit is measured in the same run.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dspnet_fast.ops import registry

ROOT = Path(__file__).parent.parent
LINES: list[dict] = []


@functools.cache
def _tests_pass(operator: str) -> bool:
    tests = ROOT / "tests" / "ops" / f"test_{operator}.py"
    return subprocess.run([sys.executable, "-m", "pytest", "-q", tests], cwd=ROOT, capture_output=True).returncode == 0


@functools.cache
def copy_bandwidth(footprint: int) -> float:
    """GB/s that a copy reads and writes together, the median of 15, between two halves of `footprint` bytes.

    As many bytes as the operator works on, so that both find the same share of them in the caches.
    """
    source = torch.ones(footprint // 8)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - began)
    return 2 * source.nbytes / statistics.median(seconds[5:]) / 1e9


@pytest.fixture
def moves(benchmark) -> Iterator[Callable[..., None]]:
    """moves(operator, case, variant, footprint, count, run): time `run`.

    It reads and writes `count` bytes in all, of the `footprint` bytes that it works on.
    """

    def measure(operator: str, case: str, variant: str, footprint: int, count: int, run: Callable[[], object]) -> None:
        if not _tests_pass(operator):
            pytest.fail(f"the tests of {operator} fail: nothing is timed")
        before = registry.get_policy()
        if variant in registry.PROVIDERS:
            registry.set_policy(variant)
        try:
            benchmark.pedantic(run, rounds=30, warmup_rounds=5)
        finally:
            registry.set_policy(before)
        median = benchmark.stats.stats.median
        bandwidth = count / median / 1e9
        LINES.append(
            {
                "operator": operator,
                "case": case,
                "variant": variant,
                "ms": 1e3 * median,
                "GB/s": bandwidth,
                "copy GB/s": copy_bandwidth(footprint),
            }
        )
        benchmark.extra_info.update(LINES[-1])

    yield measure


def pytest_terminal_summary(terminalreporter) -> None:
    """Print what was measured, variants of one case beside each other."""
    if not LINES:
        return
    terminalreporter.section("share of this machine's copy bandwidth")
    terminalreporter.write_line(f"{torch.get_num_threads()} threads; times are medians, x is against the first line")
    first: dict[tuple, float] = {}
    for line in LINES:
        base = first.setdefault((line["operator"], line["case"]), line["ms"])
        terminalreporter.write_line(
            f"{line['operator']:<16}{line['case']:<26}{line['variant']:<14}{line['ms']:9.2f} ms"
            f"{line['GB/s']:7.1f} GB/s, copy {line['copy GB/s']:5.1f}: {line['GB/s'] / line['copy GB/s']:4.0%}"
            f"{base / line['ms']:7.2f}x"
        )
