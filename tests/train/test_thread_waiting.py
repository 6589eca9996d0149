"""Threads that wait sleep while other processes are busy, and spin otherwise."""

import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from train.run import thread_waiting
from train.run.thread_waiting import BUSY, INTERVAL, QUIET, ThreadWaiting, waited_seconds

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only on Linux")


@pytest.fixture
def machine(monkeypatch):
    """Seconds passed and waited, which a test sets; with two threads."""
    for setting in thread_waiting.SETTINGS:
        monkeypatch.delenv(setting, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield {"passed": 0.0, "waited": 0.0}
    torch.set_num_threads(before)


def waiting_of(machine):
    return ThreadWaiting(lambda: machine["waited"], lambda: machine["passed"])


def after(machine, waiting, seconds, share):
    """A step that ends `seconds` later, of which the two threads had no core for this share."""
    machine["passed"] += seconds
    machine["waited"] += share * seconds * 2
    waiting.after_step()
    return waiting.sleeps


def threads():
    return len(list(Path("/proc/self/task").iterdir()))


def test_threads_sleep_while_others_are_busy(machine):
    with waiting_of(machine) as waiting:
        assert not after(machine, waiting, INTERVAL / 2, 3 * BUSY), "too early to tell"
        assert not after(machine, waiting, 2.5 * INTERVAL, 0), "half of BUSY over all seconds"
        assert after(machine, waiting, INTERVAL, 2 * BUSY)
        assert after(machine, waiting, INTERVAL, (BUSY + QUIET) / 2), "neither busy nor quiet: as it was"
        assert not after(machine, waiting, INTERVAL, QUIET / 2)


def test_sleeping_needs_more_openmp_threads_than_cores(machine):
    torch.empty(1 << 20).fill_(0)
    before = threads()
    with waiting_of(machine) as waiting:
        after(machine, waiting, INTERVAL, 1)
        others = threads() - before
        # every pool is a thread that holds it and, for two threads, one more of OpenMP
        assert others % 2 == 0 and 2 + others // 2 > len(os.sched_getaffinity(0))
        pools = [thread for thread in threading.enumerate() if thread.name.endswith("(_hold_pool)")]
        assert len(pools) == others // 2
        after(machine, waiting, INTERVAL, 1)
        assert threads() - before == others, "once"
    assert not any(pool.is_alive() for pool in pools)


@pytest.mark.parametrize("setting", thread_waiting.SETTINGS)
def test_settings_of_the_user_decide(machine, monkeypatch, setting):
    monkeypatch.setenv(setting, "1")
    with waiting_of(machine) as waiting:
        assert not after(machine, waiting, INTERVAL, 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_training_goes_on_without_memory_for_a_pool(machine, monkeypatch):
    def empty(*size):
        raise RuntimeError("out of memory")

    with waiting_of(machine) as waiting:
        monkeypatch.setattr(torch, "empty", empty)
        after(machine, waiting, INTERVAL, 1)
        monkeypatch.undo()
        assert not after(machine, waiting, INTERVAL, 0)


def test_a_training_goes_on_without_further_threads(machine, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    with waiting_of(machine) as waiting:
        monkeypatch.setattr(threading.Thread, "start", start)
        assert not after(machine, waiting, INTERVAL, 1)


def test_one_thread_waits_for_none(machine):
    torch.set_num_threads(1)
    with waiting_of(machine) as waiting:
        assert not after(machine, waiting, INTERVAL, 1)


def test_waited_seconds_of_threads_that_compete_for_one_core():
    """Two threads that compute outside of Python's lock on one core: one of them always waits."""
    cores = os.sched_getaffinity(0)
    product = torch.randn(400, 400)

    def compute():
        os.sched_setaffinity(0, {min(cores)})  # of this thread
        while not ended.is_set():
            product @ product

    ended, before = threading.Event(), waited_seconds()
    pair = [threading.Thread(target=compute) for _ in range(2)]
    for thread in pair:
        thread.start()
    ended.wait(0.5)
    ended.set()
    found = waited_seconds() - before
    for thread in pair:
        thread.join()
    assert found > 0.2
