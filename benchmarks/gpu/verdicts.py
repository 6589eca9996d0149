"""A pytest plugin, `-p benchmarks.gpu.verdicts`: every test's outcome is kept at once (records.py), and read again.

A GPU that an illegal access has broken fails every test that follows in the same process, so such a process of
pytest-xdist ends and another takes over. SIGTERM ends the session as Ctrl-C does, with its summary.
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
    """As Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep what it says."""
    if report.failed:
        _failed.add(report.nodeid)
    if not IS_WORKER and (report.when == "call" or not report.passed):
        text = {"text": report.longreprtext[-3000:]} if report.failed else {}
        records.write("test", id=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2), **text)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Leave a broken GPU to another process."""
    if IS_WORKER and nodeid in _failed and is_broken():
        print(f"{nodeid} broke the GPU for this process", file=sys.stderr, flush=True)
        os._exit(1)


def of(operator: str) -> str:
    """What the tests of that operator that were kept say: "passed", "failed", or "untested"."""
    of_it = f"tests/ops/test_{operator}.py::", f"tests/csrc/test_on_gpu.py::test_{operator}"
    tests = [line for line in records.read() if line["kind"] == "test"]
    outcomes = {line["outcome"] for line in tests if line["id"].startswith(of_it)}
    return next((outcome for outcome in ("failed", "passed") if outcome in outcomes), "untested")
