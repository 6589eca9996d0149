"""A pytest plugin, `-p benchmarks.gpu.verdicts`: records collected tests and the outcome of each (records.py).

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

SESSION = "DSPNET_BENCH_SESSION"
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
_failed: set[str] = set()


def pytest_configure(config: pytest.Config) -> None:
    """Handle SIGTERM like Ctrl-C, and name the session, also for workers."""
    os.environ.setdefault(SESSION, str(os.getpid()))
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Record the tests that will run, once: workers of pytest-xdist collect the same ones."""
    if session.items and os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":
        functions = sorted({item.nodeid.split("[")[0] for item in session.items})
        records.write("tests begun", session=os.environ[SESSION], functions=functions)


def pytest_sessionfinish(exitstatus: int) -> None:
    """Record that all tests ran."""
    if not IS_WORKER and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        records.write("tests done", session=os.environ[SESSION])


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
    """State of an operator's verification and tests.

    Returns:
        "failed" after any failure; "incomplete" if a session of tests was cut off; "passed"; "untested".
    """
    lines = records.read()
    verified = [line["verified"] for line in lines if line["kind"] == "verified" and line["operator"] == operator]
    prefixes = f"tests/ops/test_{operator}.py::", f"tests/csrc/test_on_gpu.py::test_{operator}"
    outcomes = {line["outcome"] for line in lines if line["kind"] == "test" and line["id"].startswith(prefixes)}
    done = {line["session"] for line in lines if line["kind"] == "tests done"}
    begun = [line for line in lines if line["kind"] == "tests begun" and line["session"] not in done]
    if "failed" in outcomes or not all(verified):
        return "failed"
    if any(function.startswith(prefixes) for line in begun for function in line["functions"]):
        return "incomplete"
    return "passed" if verified or "passed" in outcomes else "untested"
