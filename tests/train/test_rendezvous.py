"""The ranks of one start find each other, whatever an earlier start has left in the store."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from train.distributed import rendezvous
from train.distributed.rendezvous import confirm, publish

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without torch.distributed")
SIZE = 3
ENOUGH = timedelta(seconds=60)


@pytest.fixture
def connect():
    """A new connection to one store, as every process has its own."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)


def start(connect, late: float = 0.0) -> list[str]:
    """The names that the ranks of one start end up with; rank 0 comes so many seconds after the others."""
    names = [""] * SIZE

    def guest(rank: int) -> None:
        names[rank] = confirm(connect(), rank, ENOUGH)

    guests = [threading.Thread(target=guest, args=(rank,)) for rank in range(1, SIZE)]
    for thread in guests:
        thread.start()
    time.sleep(late)
    names[0] = publish(connect(), SIZE)
    for thread in guests:
        thread.join()
    return names


def test_every_start_has_a_name_of_its_own(connect, monkeypatch):
    monkeypatch.setattr(rendezvous, "STALE_SECONDS", 0.1)
    first, again = start(connect), start(connect, late=0.5)  # when the others have found the old name several times
    assert len(set(first)) == len(set(again)) == 1
    assert first[0] and again[0] and first[0] != again[0]


def test_a_rank_0_that_does_not_come_is_an_error(connect, monkeypatch):
    monkeypatch.setattr(rendezvous, "STALE_SECONDS", 0.1)
    connect().set("launch", "of a process that is gone")
    with pytest.raises(RuntimeError, match="rank 0 did not answer rank 2"):
        confirm(connect(), 2, timedelta(seconds=0.5))
