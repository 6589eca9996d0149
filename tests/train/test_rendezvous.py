"""Rendezvous: the ranks of one launch agree on its id, despite entries of an earlier launch in the store."""

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
    """connect(): a new connection to the store."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)


def start(connect, late: float = 0.0) -> list[str]:
    """Launch ids that the ranks obtain; rank 0 starts `late` seconds after the others."""
    ids = [""] * SIZE

    def confirm_rank(rank: int) -> None:
        ids[rank] = confirm(connect(), rank, ENOUGH)

    others = [threading.Thread(target=confirm_rank, args=(rank,)) for rank in range(1, SIZE)]
    for thread in others:
        thread.start()
    time.sleep(late)
    ids[0] = publish(connect(), SIZE)
    for thread in others:
        thread.join()
    return ids


def test_every_launch_has_a_new_id(connect, monkeypatch):
    monkeypatch.setattr(rendezvous, "STALE_SECONDS", 0.1)
    first, again = start(connect), start(connect, late=0.5)  # the others read the old id several times
    assert len(set(first)) == len(set(again)) == 1
    assert first[0] and again[0] and first[0] != again[0]


def test_missing_rank_0_is_an_error(connect, monkeypatch):
    monkeypatch.setattr(rendezvous, "STALE_SECONDS", 0.1)
    connect().set("launch", "of a process that is gone")
    with pytest.raises(RuntimeError, match="rank 0 did not answer rank 2"):
        confirm(connect(), 2, timedelta(seconds=0.5))
