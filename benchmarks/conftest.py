"""`pytest benchmarks/ --benchmark-only`: time the providers of each operator and eager alternatives.

The tests of an operator run first; if they fail, the operator is not timed. The summary shows the fraction of the
machine's limits that each variant reaches; the limits are measured in the same run. DSPNET_BENCH_COMPILE=1 adds the
eager alternatives under torch.compile, which takes minutes. See benchmarks/device.py for GPUs and bf16.

With DSPNET_BENCH_RESULTS (benchmarks/gpu/records.py), every result is written immediately, test outcomes are read from
this file instead of running the tests, and variants that were started in an earlier process are skipped. Operators
whose tests failed or did not run are timed, but shown without a speed-up.
"""

from __future__ import annotations

import functools
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dspnet_fast.ops import registry

from .device import ON_GPU, PRECISION, Times, configure, gpu_times, is_broken, name
from .gpu import records, verdicts
from .machine import copy_bandwidth, peak_gflops, roofline_seconds

ROOT = Path(__file__).parent.parent
OURS = registry.PROVIDERS
SECONDS = 0.08 if ON_GPU else 0.4  # approximate duration of a measurement
ROUNDS = 5, 30  # smallest and largest number of samples
LINES: list[dict] = []
KEPT = "DSPNET_BENCH_RESULTS" in os.environ
BROKEN = 3  # exit code of the session if the GPU needs a new process


def pytest_configure(config: pytest.Config) -> None:
    """End the session with its summary on SIGTERM; hide the warning that pytest-benchmark is unused on a GPU."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used at all")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU, time the slow native implementations last."""
    if ON_GPU:
        items.sort(key=lambda item: "native" in item.name)


@functools.cache
def _verdict(operator: str) -> str:
    """Outcome of the operator's tests: passed, failed or untested."""
    if KEPT:
        return verdicts.of(operator)
    tests = ROOT / "tests" / "ops" / f"test_{operator}.py"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", tests], cwd=ROOT, capture_output=True)
    return "failed" if done.returncode else "passed"


def _key(operator: str, case: str, variant: str) -> dict[str, str]:
    return {"precision": PRECISION, "operator": operator, "case": case, "variant": variant}


@functools.cache
def _started() -> list[dict]:
    return [{k: v for k, v in line.items() if k != "kind"} for line in records.read() if line["kind"] == "started"]


def _rounds(run: Callable[[], object]) -> int:
    run()
    began = time.perf_counter()
    run()
    return int(min(max(SECONDS / (time.perf_counter() - began), ROUNDS[0]), ROUNDS[1]))


@pytest.fixture
def measure(benchmark) -> Iterator[Callable[..., None]]:
    """measure(operator, case, variant, footprint, count, run, flops): time `run`.

    `count` is the number of bytes that the operator must read and write, `footprint` the size of its working set in
    bytes, `flops` its arithmetic. They are the same for all variants of an operator.
    """

    def time_variant(
        operator: str,
        case: str,
        variant: str,
        footprint: int,
        count: int,
        run: Callable[[], object],
        flops: float = 0,
    ) -> None:
        if _verdict(operator) != "passed" and not KEPT:
            pytest.fail(f"the tests of {operator} fail or do not exist: it is not timed")
        key = _key(operator, case, variant)
        if key in _started():
            pytest.skip("started before, in another process")
        records.write("started", **key)
        before = registry.get_policy()
        if variant in OURS:
            registry.set_policy(variant)
        configure(ours=variant in OURS, tried=variant not in OURS)
        try:
            if ON_GPU:
                times = gpu_times(run, SECONDS)
                copied = max(footprint, count)  # short copies would measure launch latency
                bandwidth, limit = copy_bandwidth(copied), roofline_seconds(flops, count, copied)
            else:
                benchmark.pedantic(run, rounds=_rounds(run), warmup_rounds=2)
                times = Times(benchmark.stats.stats.data, captured=False)
                bandwidth, limit = copy_bandwidth(footprint), roofline_seconds(flops, count, footprint)
        except Exception as error:
            records.write("operator", **key, error=f"{type(error).__name__}: {error}"[:500])
            if is_broken():
                pytest.exit(f"{operator}, {case}, {variant} made the GPU unusable for this process: {error}", BROKEN)
            raise
        finally:
            registry.set_policy(before)
            configure(ours=False)
        median = statistics.median(times.seconds)
        LINES.append(
            {
                **key,
                "ms": 1e3 * median,
                "GB/s": count / median / 1e9,
                "GFLOP/s": flops / median / 1e9,
                "copy GB/s": bandwidth,
                "share": limit / median,
                "bytes": footprint,
                "captured": times.captured,
                "tests": _verdict(operator),
            }
        )
        records.write("operator", **LINES[-1])
        benchmark.extra_info.update(LINES[-1])
        if ON_GPU and not times.captured and is_broken():
            pytest.exit(f"{operator}, {case}, {variant} could not be captured: the next process continues", BROKEN)

    with records.exclusive_gpu():
        yield time_variant


def pytest_sessionfinish(exitstatus: int) -> None:
    """Record that all benchmarks were run."""
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        records.write("operators done", precision=PRECISION, compiled=os.environ.get("DSPNET_BENCH_COMPILE") == "1")


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the results by case; fast providers that are slower than the alternative in red."""
    if not LINES:
        return
    terminalreporter.section("fraction of this machine's limit")
    terminalreporter.write_line(
        f"{name()}, {peak_gflops():.0f} GFLOP/s. Times are medians; x is the speed-up over eager.\n"
        "The fraction is the roofline time, the larger of the bytes at copy speed and the arithmetic at peak "
        "speed, divided by the measured time."
    )
    cases: dict[tuple, list[dict]] = {}
    for line in LINES:
        cases.setdefault((line["operator"], line["case"]), []).append(line)
    operators, names = (max(len(line[key]) for line in LINES) + 2 for key in ("operator", "case"))
    for lines in cases.values():
        baseline = next((line["ms"] for line in lines if line["variant"] == "eager"), None)
        for line in lines:
            slower = line["variant"] in OURS and baseline is not None and line["ms"] > baseline
            gains = f"{baseline / line['ms']:7.2f}x{'  slower' if slower else ''}" if baseline else ""
            terminalreporter.write_line(
                f"{line['operator']:<{operators}}{line['case']:<{names}}{line['variant']:<8}{line['ms']:9.3f} ms"
                f"{line['GFLOP/s']:6.0f} GFLOP/s{line['GB/s']:7.1f} GB/s, copy {line['copy GB/s']:5.1f}: "
                f"{line['share']:4.0%}{gains if line['tests'] == 'passed' else '  tests ' + line['tests']}"
                f"{'' if line['captured'] or not ON_GPU else '  launched'}",
                **({"red": True, "bold": True} if slower and line["variant"] != "native" else {}),
            )
