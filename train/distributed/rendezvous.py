"""Rendezvous: gives every launch of a job its own part of torchrun's store.

torchrun keeps its store when it restarts the ranks, and Gloo and NCCL leave their addresses in it. A rank that starts
early would read the address of a process that no longer exists and wait for it. The machines' restart counts may differ
too. Therefore rank 0 creates a random launch id, and every other rank verifies by a handshake that the id it has read
is that of a live rank 0.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

STALE_SECONDS = 1.0  # without an answer the launch id is read again
POLL_SECONDS = 0.02


def rendezvous(timeout: timedelta) -> tuple[dist.Store, str]:
    """The store for `init_process_group` and the launch id, the same on all ranks.

    Raises RuntimeError if rank 0 does not answer in time.
    """
    from torch.distributed.rendezvous import rendezvous as torch_rendezvous  # not in every build of PyTorch

    store, rank, size = next(torch_rendezvous("env://", timeout=timeout))
    launch_id = publish(store, size) if rank == 0 else confirm(store, rank, timeout)
    return dist.PrefixStore(launch_id, store), launch_id


def publish(store: dist.Store, size: int) -> str:
    """On rank 0: write a new launch id and answer every other rank."""
    launch_id = uuid.uuid4().hex
    store.set("launch", launch_id)
    for rank in range(1, size):
        nonce = store.get(f"{launch_id}/{rank}").decode()
        store.set(f"{launch_id}/{nonce}", "confirmed")
    return launch_id


def confirm(store: dist.Store, rank: int, timeout: timedelta) -> str:
    """On other ranks: the launch id that a live rank 0 confirms."""
    nonce, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        launch_id, asked = store.get("launch").decode(), time.monotonic()
        store.set(f"{launch_id}/{rank}", nonce)
        while time.monotonic() < asked + STALE_SECONDS:
            if store.check([f"{launch_id}/{nonce}"]):
                return launch_id
            time.sleep(POLL_SECONDS)
    raise RuntimeError(f"rank 0 did not answer rank {rank} within {timeout}")
