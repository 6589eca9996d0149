"""A pytest plugin, `-p benchmarks.gpu.verdicts`: records the outcome of every test immediately (records.py).

After an illegal access, all later tests of the process fail. Workers of pytest-xdist therefore exit, and xdist starts
new ones. SIGTERM ends the session like Ctrl-C, with a summary.
"""

from __future__ import annotations

import os
import signal
import sys

import pytest

from benchmarks.device import is_broken

from . import records

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
_failed: set[str] = set()


def pytest_configure(config: pytest.Config) -> None:
    """Handle SIGTERM like Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record the outcome."""
    if report.failed:
        _failed.add(report.nodeid)
    if not IS_WORKER and (report.when == "call" or not report.passed):
        text = {"text": report.longreprtext[-3000:]} if report.failed else {}
        records.write("test", id=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2), **text)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Exit a worker whose GPU context is broken."""
    if IS_WORKER and nodeid in _failed and is_broken():
        print(f"{nodeid} made the GPU unusable for this process", file=sys.stderr, flush=True)
        os._exit(1)


def of(operator: str) -> str:
    """Recorded outcome of an operator's tests: "passed", "failed" or "untested"."""
    prefixes = f"tests/ops/test_{operator}.py::", f"tests/csrc/test_on_gpu.py::test_{operator}"
    tests = [line for line in records.read() if line["kind"] == "test"]
    outcomes = {line["outcome"] for line in tests if line["id"].startswith(prefixes)}
    return next((outcome for outcome in ("failed", "passed") if outcome in outcomes), "untested")
