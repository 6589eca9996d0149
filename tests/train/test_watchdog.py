"""Watchdog: reports of stalled runs, and detection of lost ranks by missing heartbeats."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from train.distributed import watchdog
from train.distributed.process_group import SINGLE_PROCESS, World
from train.distributed.watchdog import FINISHED, LOST_RANK, Heartbeats, Watchdog

SERVER = """
import time
import torch.distributed as dist
server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(server.port, flush=True)
time.sleep(600)
"""


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(watchdog, "SILENT_SECONDS", 0.5)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_stalled_run_reports_step_activity_and_stack(quick, tmp_path):
    messages: list[str] = []
    with Watchdog(SINGLE_PROCESS, 0.1, tmp_path / "stalled.txt", messages.append) as dog:
        dog.at(7, "waiting for images")
        wait_for(lambda: messages)
        first = len(messages)
        dog.at(8, "training")
        wait_for(lambda: len(messages) > first)
    assert "after step 7: waiting for images" in messages[0] and str(tmp_path / "stalled.txt") in messages[0]
    assert "after step 8: training" in messages[-1]
    assert "wait_for" in (tmp_path / "stalled.txt").read_text()  # the stack of the main thread


def test_reports_become_less_frequent(quick, tmp_path):
    messages: list[str] = []
    with Watchdog(SINGLE_PROCESS, 0.05, tmp_path / "stalled.txt", messages.append):
        time.sleep(1)
    assert 1 <= len(messages) <= 6  # after 0.05, 0.1, 0.2 s and so on, not every 0.02 s


@pytest.mark.parametrize("stall_timeout", [0.0, 100.0])
def test_progressing_run_is_not_reported(quick, tmp_path, stall_timeout):
    messages: list[str] = []
    with Watchdog(SINGLE_PROCESS, stall_timeout, tmp_path / "stalled.txt", messages.append):
        time.sleep(0.2)
    assert not messages and not (tmp_path / "stalled.txt").exists()


@pytest.fixture
def store(monkeypatch):
    """The store of the job, as torchrun creates it."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    return server


@pytest.fixture
def pulse(quick, store):
    """pulse(rank, size): start the heartbeats of a rank in step 12."""
    begun: list[Heartbeats] = []

    def begin(rank, size, launch_id="first") -> Heartbeats:
        begun.append(Heartbeats(World(rank, size, launch_id=launch_id), lambda: (12, "training")))
        begun[-1].start()
        return begun[-1]

    yield begin
    for each in begun:
        each.stop(finished=True)


def test_rank_without_heartbeats_is_named(pulse):
    first, second, third = (pulse(rank, 3) for rank in range(3))
    time.sleep(2 * watchdog.SILENT_SECONDS)
    assert not (first.lost or second.lost or third.lost)
    second.stop(finished=False)
    wait_for(lambda: first.lost)
    assert f"rank 1 ({socket.gethostname()}, pid {os.getpid()}) has not been heard of" in first.lost
    assert "its last step was 12, then: training" in first.lost
    wait_for(lambda: third.lost)  # ranks that watch another rank are informed too
    assert third.lost == first.lost


def test_finished_rank_is_not_reported(pulse, store):
    first, second = pulse(0, 2), pulse(1, 2)
    second.stop(finished=True)
    time.sleep(2 * watchdog.SILENT_SECONDS)
    assert not first.lost
    assert store.get("heartbeats/first/1").decode() == FINISHED


def test_heartbeats_of_an_earlier_launch_are_ignored(pulse):
    """torchrun keeps the store when it restarts the ranks."""
    gone = pulse(1, 2)
    gone.stop(finished=False)
    before = pulse(0, 2)
    wait_for(lambda: before.lost)
    first, second = pulse(0, 2, launch_id="second"), pulse(1, 2, launch_id="second")
    time.sleep(2 * watchdog.SILENT_SECONDS)
    assert not (first.lost or second.lost)


def test_lost_rank_ends_the_process(quick, store, tmp_path, capfd):
    ended: list[int] = []
    with Watchdog(World(0, 2), 0, tmp_path / "stalled.txt", print, ended.append):
        wait_for(lambda: ended)
    assert ended == [LOST_RANK]
    assert "error: rank 1 has not begun; rank 0 ends the job" in capfd.readouterr().err


def test_unresponsive_store_ends_the_process(quick, tmp_path, monkeypatch, capfd):
    """The server process is stopped: the connection stays open, but calls do not return."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", server.stdout.readline().strip())
        other = Heartbeats(World(1, 2), lambda: (0, "training"))
        other.start()
        ended: list[int] = []
        with Watchdog(World(0, 2), 0, tmp_path / "stalled.txt", print, ended.append):
            time.sleep(2 * watchdog.SILENT_SECONDS)
            assert not ended
            server.send_signal(signal.SIGSTOP)
            wait_for(lambda: ended)
        assert ended == [LOST_RANK]
        assert "has not answered for" in capfd.readouterr().err
    finally:
        server.kill()  # pending calls return now
        server.wait()
        other.stop(finished=False)


def test_failing_report_does_not_stop_the_watchdog(quick, store, tmp_path):
    """For example if the disk is full."""

    def fail(line):
        raise OSError(line)

    ended: list[int] = []
    with Watchdog(World(0, 2), 0.1, tmp_path / "stalled.txt", fail, ended.append):
        wait_for(lambda: ended)


def test_every_rank_writes_a_separate_stack_file(quick, pulse, tmp_path):
    """All ranks stall together, but the stack of one of them shows the cause."""
    pulse(0, 2)
    messages: list[str] = []
    with Watchdog(World(1, 2, launch_id="first"), 0.1, tmp_path / "stalled.txt", messages.append):
        wait_for(lambda: messages)
        wait_for((tmp_path / "stalled-rank1.txt").exists)
    assert messages[0].startswith("rank 1: no step for") and "stalled-rank1.txt" in messages[0]
