"""`pytest benchmarks/ --benchmark-only`: time each operator's providers beside the alternatives, correct ones only.

Before an operator is timed its tests run; where they fail, nothing is timed. Every line of the summary says what share
of the machine's limit was reached, and the limit is measured in the same run. With DSPNET_BENCH_COMPILE=1 the eager
alternatives are timed under torch.compile as well, which takes minutes longer. benchmarks/device.py says how to time on
a GPU, or in bf16.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dspnet_fast.ops import registry

from .device import name, synchronized
from .machine import copy_bandwidth, peak_gflops, roofline_seconds

ROOT = Path(__file__).parent.parent
OURS = registry.PROVIDERS
SECONDS = 0.4  # that one measurement takes, about
ROUNDS = 5, 30  # at least, at most
LINES: list[dict] = []


@functools.cache
def _tests_pass(operator: str) -> bool:
    tests = ROOT / "tests" / "ops" / f"test_{operator}.py"
    return subprocess.run([sys.executable, "-m", "pytest", "-q", tests], cwd=ROOT, capture_output=True).returncode == 0


def _rounds(run: Callable[[], object]) -> int:
    run()
    began = time.perf_counter()
    run()
    return int(min(max(SECONDS / (time.perf_counter() - began), ROUNDS[0]), ROUNDS[1]))


@pytest.fixture
def moves(benchmark) -> Iterator[Callable[..., None]]:
    """moves(operator, case, variant, footprint, count, run, flops): time `run`.

    It reads and writes `count` bytes in all, of the `footprint` bytes that it works on, and computes `flops`. These are
    what the operator has to do, the same for every variant, whatever a variant does beyond them.
    """

    def measure(
        operator: str,
        case: str,
        variant: str,
        footprint: int,
        count: int,
        run: Callable[[], object],
        flops: float = 0,
    ) -> None:
        if not _tests_pass(operator):
            pytest.fail(f"the tests of {operator} fail, or there are none: nothing is timed")
        before = registry.get_policy()
        if variant in OURS:
            registry.set_policy(variant)
        try:
            run = synchronized(run)
            benchmark.pedantic(run, rounds=_rounds(run), warmup_rounds=2)
        finally:
            registry.set_policy(before)
        median = benchmark.stats.stats.median
        LINES.append(
            {
                "operator": operator,
                "case": case,
                "variant": variant,
                "ms": 1e3 * median,
                "GB/s": count / median / 1e9,
                "GFLOP/s": flops / median / 1e9,
                "copy GB/s": copy_bandwidth(footprint),
                "share": roofline_seconds(flops, count, footprint) / median,
            }
        )
        benchmark.extra_info.update(LINES[-1])

    yield measure


def pytest_terminal_summary(terminalreporter) -> None:
    """Print what was measured, variants of one case beside each other; in red where a fast provider loses."""
    if not LINES:
        return
    terminalreporter.section("share of this machine's limit")
    terminalreporter.write_line(
        f"{name()}, {peak_gflops():.0f} GFLOP/s. Times are medians, x is against the "
        "first line of a case.\nThe share is of the longer of two times: of its bytes at the speed of a copy of as "
        "many, and of its arithmetic at that peak."
    )
    cases: dict[tuple, list[dict]] = {}
    for line in LINES:
        cases.setdefault((line["operator"], line["case"]), []).append(line)
    operators, names = (max(len(line[key]) for line in LINES) + 2 for key in ("operator", "case"))
    for lines in cases.values():
        for line in lines:
            slower = line["variant"] in OURS and line["ms"] > lines[0]["ms"]
            terminalreporter.write_line(
                f"{line['operator']:<{operators}}{line['case']:<{names}}{line['variant']:<8}{line['ms']:9.3f} ms"
                f"{line['GFLOP/s']:6.0f} GFLOP/s{line['GB/s']:7.1f} GB/s, copy {line['copy GB/s']:5.1f}: "
                f"{line['share']:4.0%}{lines[0]['ms'] / line['ms']:7.2f}x{'  slower' if slower else ''}",
                **({"red": True, "bold": True} if slower and line["variant"] != "native" else {}),
            )
