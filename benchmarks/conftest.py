"""`pytest benchmarks/ --benchmark-only`: time each operator's providers beside the alternatives, correct ones only.

Before an operator is timed its tests run; where they fail, nothing is timed. Every line of the summary says what share
of the machine's limit was reached, and the limit is measured in the same run. With DSPNET_BENCH_COMPILE=1 the eager
alternatives are timed under torch.compile as well, which takes minutes longer. benchmarks/device.py says how to time on
a GPU, or in bf16.

With DSPNET_BENCH_RESULTS (benchmarks/gpu/records.py) every line is kept at once, the verdict on an operator is that of
the tests whose outcomes are kept there, and what has been begun there is not begun again. What fails, or was not
tested, is then timed all the same, but shown without what it gains.
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
ALTERNATIVES = ("eager", "loop")  # what x is against
SECONDS = 0.08 if ON_GPU else 0.4  # that one measurement takes, about
ROUNDS = 5, 30  # at least, at most
LINES: list[dict] = []
KEPT = "DSPNET_BENCH_RESULTS" in os.environ
BROKEN = 3  # the session's exit code when a new process is needed to go on


def pytest_configure(config: pytest.Config) -> None:
    """What has been measured is shown even when time is up; on a GPU pytest-benchmark's clock is not used."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used at all")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU the native bodies come last: they are written to be read."""
    if ON_GPU:
        items.sort(key=lambda item: "native" in item.name)


@functools.cache
def _verdict(operator: str) -> str:
    """passed, failed or untested."""
    if KEPT:
        return verdicts.of(operator)
    tests = ROOT / "tests" / "ops" / f"test_{operator}.py"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", tests], cwd=ROOT, capture_output=True)
    return "failed" if done.returncode else "passed"


def _key(operator: str, case: str, variant: str) -> dict[str, str]:
    return {"precision": PRECISION, "operator": operator, "case": case, "variant": variant}


@functools.cache
def _begun() -> list[dict]:
    return [{k: v for k, v in line.items() if k != "kind"} for line in records.read() if line["kind"] == "begun"]


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
        if _verdict(operator) != "passed" and not KEPT:
            pytest.fail(f"the tests of {operator} fail, or there are none: nothing is timed")
        key = _key(operator, case, variant)
        if key in _begun():
            pytest.skip("begun before, in a process that has ended")
        records.write("begun", **key)
        before = registry.get_policy()
        if variant in OURS:
            registry.set_policy(variant)
        configure(ours=variant in OURS, tried=variant not in OURS)
        try:
            if ON_GPU:
                times = gpu_times(run, SECONDS)
                copied = max(footprint, count)  # as much: what is short begins and ends for longer
                bandwidth, limit = copy_bandwidth(copied), roofline_seconds(flops, count, copied)
            else:
                benchmark.pedantic(run, rounds=_rounds(run), warmup_rounds=2)
                times = Times(benchmark.stats.stats.data, recorded=False)
                bandwidth, limit = copy_bandwidth(footprint), roofline_seconds(flops, count, footprint)
        except Exception as error:
            records.write("operator", **key, error=f"{type(error).__name__}: {error}"[:500])
            if is_broken():
                pytest.exit(f"{operator}, {case}, {variant} broke the GPU for this process: {error}", BROKEN)
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
                "recorded": times.recorded,
                "tests": _verdict(operator),
            }
        )
        records.write("operator", **LINES[-1])
        benchmark.extra_info.update(LINES[-1])
        if ON_GPU and not times.recorded and is_broken():
            pytest.exit(f"{operator}, {case}, {variant} could not be recorded: the next process goes on", BROKEN)

    with records.alone():
        yield measure


def pytest_sessionfinish(exitstatus: int) -> None:
    """That there is no more to come."""
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        records.write("operators done", precision=PRECISION, compiled=os.environ.get("DSPNET_BENCH_COMPILE") == "1")


def pytest_terminal_summary(terminalreporter) -> None:
    """Print what was measured, variants of one case beside each other; in red where a fast provider loses."""
    if not LINES:
        return
    terminalreporter.section("share of this machine's limit")
    terminalreporter.write_line(
        f"{name()}, {peak_gflops():.0f} GFLOP/s. Times are medians, x is against eager, or a loop."
        "\nThe share is of the longer of two times: of its bytes at the speed of a copy of as "
        "many, and of its arithmetic at that peak."
    )
    cases: dict[tuple, list[dict]] = {}
    for line in LINES:
        cases.setdefault((line["operator"], line["case"]), []).append(line)
    operators, names = (max(len(line[key]) for line in LINES) + 2 for key in ("operator", "case"))
    for lines in cases.values():
        other = next((line["ms"] for line in lines if line["variant"] in ALTERNATIVES), None)
        for line in lines:
            slower = line["variant"] in OURS and other is not None and line["ms"] > other
            gains = f"{other / line['ms']:7.2f}x{'  slower' if slower else ''}" if other else ""
            terminalreporter.write_line(
                f"{line['operator']:<{operators}}{line['case']:<{names}}{line['variant']:<8}{line['ms']:9.3f} ms"
                f"{line['GFLOP/s']:6.0f} GFLOP/s{line['GB/s']:7.1f} GB/s, copy {line['copy GB/s']:5.1f}: "
                f"{line['share']:4.0%}{gains if line['tests'] == 'passed' else '  tests ' + line['tests']}"
                f"{'' if line['recorded'] or not ON_GPU else '  launched'}",
                **({"red": True, "bold": True} if slower and line["variant"] != "native" else {}),
            )
