"""Where the ranks of one start of a job meet: a part of torchrun's store that is theirs alone.

torchrun keeps its store when it starts the ranks again, and Gloo and NCCL leave addresses in it. A rank that is quick
would find those of a process that is gone, and wait for it. Nor do all machines count the same restarts. So rank 0
makes a name up, and every other rank makes sure that the name which it has found is that of a rank 0 that is there.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

STALE = 1.0  # seconds without an answer, after which the name is looked up again
PAUSE = 0.02  # seconds between two looks for an answer


def meet(timeout: timedelta) -> tuple[dist.Store, str]:
    """The store of this start, for `init_process_group`, and the name of the start, the same on all ranks.

    What torchrun has put into the environment says where. Raises RuntimeError if the others do not come in time.
    """
    from torch.distributed.rendezvous import rendezvous  # not in every build of PyTorch

    store, rank, size = next(rendezvous("env://", timeout=timeout))
    name = invite(store, size) if rank == 0 else find(store, rank, timeout)
    return dist.PrefixStore(name, store), name


def invite(store: dist.Store, size: int) -> str:
    """Rank 0's part: a new name, and an answer to every other rank."""
    name = uuid.uuid4().hex
    store.set("start", name)
    for rank in range(1, size):
        guest = store.get(f"{name}/{rank}").decode()
        store.set(f"{name}/{guest}", "welcome")
    return name


def find(store: dist.Store, rank: int, timeout: timedelta) -> str:
    """Another rank's part: the name under which rank 0 answers."""
    guest, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        name, asked = store.get("start").decode(), time.monotonic()
        store.set(f"{name}/{rank}", guest)
        while time.monotonic() < asked + STALE:
            if store.check([f"{name}/{guest}"]):
                return name
            time.sleep(PAUSE)
    raise RuntimeError(f"rank 0 has not answered rank {rank} for {timeout}")
