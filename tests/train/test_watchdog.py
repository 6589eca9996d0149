"""The watchdog: what a run says that waits, and which rank it names that is gone."""

import time

import pytest
import torch.distributed as dist

from train import watchdog
from train.ranks import ALONE, Ranks
from train.watchdog import FINISHED, LOST, Heartbeat, Pulse, Watchdog


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(watchdog, "BEAT", 0.02)
    monkeypatch.setattr(watchdog, "SILENCE", 0.5)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_a_run_that_waits_says_for_what(quick, tmp_path):
    said: list[str] = []
    with Watchdog(ALONE, 0.1, tmp_path / "stalled.txt", said.append) as dog:
        dog.at(7, "waiting for images")
        wait_for(lambda: said)
        first = len(said)
        dog.at(8, "training")
        wait_for(lambda: len(said) > first)
    assert "after step 7: waiting for images" in said[0] and str(tmp_path / "stalled.txt") in said[0]
    assert "after step 8: training" in said[-1]
    assert "wait_for" in (tmp_path / "stalled.txt").read_text()  # where the main thread was


def test_it_complains_less_and_less_often(quick, tmp_path):
    said: list[str] = []
    with Watchdog(ALONE, 0.05, tmp_path / "stalled.txt", said.append):
        time.sleep(1)
    assert 1 <= len(said) <= 6  # 0.05, 0.1, 0.2 ... and not every 0.02 s


@pytest.mark.parametrize("patience", [0.0, 100.0])
def test_a_run_that_moves_is_left_alone(quick, tmp_path, patience):
    said: list[str] = []
    with Watchdog(ALONE, patience, tmp_path / "stalled.txt", said.append):
        time.sleep(0.2)
    assert not said and not (tmp_path / "stalled.txt").exists()


@pytest.fixture
def store(monkeypatch):
    """The job's store, as torchrun keeps it."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    return server


def beat(pulse: Pulse, count: int) -> str:
    return pulse.beat(Heartbeat(count, "host", 4321, 12, "training"))


def test_a_rank_that_falls_silent_is_named(quick, store):
    first, second = Pulse(Ranks(0, 3)), Pulse(Ranks(1, 3))
    third = Pulse(Ranks(2, 3))
    for count in range(40):  # longer than the silence that is allowed
        assert not any(beat(pulse, count) for pulse in (first, second, third))
        time.sleep(0.02)
    said = ""
    deadline = time.monotonic() + 30
    while not said and time.monotonic() < deadline:  # the second says nothing more
        count += 1
        assert not beat(third, count) or said
        said = beat(first, count)
        time.sleep(0.02)
    assert "rank 1 (host, pid 4321) has not been heard of" in said and "its last step was 12, then: training" in said
    assert beat(third, count + 1) == said  # whoever watches another one is told


def test_a_rank_that_finished_is_not_missed(quick, store):
    first, second = Pulse(Ranks(0, 2)), Pulse(Ranks(1, 2))
    beat(second, 1)
    second.finish()
    for count in range(40):
        assert not beat(first, count)
        time.sleep(0.02)
    assert store.get("heartbeats/0/1").decode() == FINISHED


def test_a_lost_rank_ends_the_process(quick, store, tmp_path, capfd):
    ended: list[int] = []
    with Watchdog(Ranks(0, 2), 0, tmp_path / "stalled.txt", print, ended.append):
        wait_for(lambda: ended)
    assert ended == [LOST]
    assert "error: rank 1 has not begun; rank 0 ends the job" in capfd.readouterr().err
