"""This process among those that train together: torch.distributed as torchrun starts it, or one process by itself.

Every rank holds all weights and computes its share of each batch. A step has one all-reduce of the flat gradient
(several, of a part each, where the exchange overlaps with the backward pass), and one of batch normalisation's running
statistics, which are vectors of channels; so all ranks go on with the same weights and the same statistics, and any of
them can write what the run is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dspnet_fast.errors import InputError

from .rendezvous import meet

# for the slowest rank, which may be measuring or writing a checkpoint while the others wait in a collective
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """rank: of this process, from 0 to size - 1. local: its number on this machine, and that of its GPU. start: a name
    that all ranks have and no earlier start of the same job had."""

    rank: int = 0
    size: int = 1
    local: int = 0
    start: str = ""

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    def begin_sum(self, tensor: Tensor) -> Callable[[], object]:
        """Begin to replace a tensor, in place, by its sum over the ranks; what is returned waits until it is done."""
        if self.size == 1:
            return lambda: None
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None
        return work.wait

    def average(self, tensor: Tensor) -> None:
        """Replace a tensor, in place, by its mean over the ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size

    def neighbours(self, count: int) -> dist.ProcessGroup | None:
        """The group of `count` consecutive ranks that this one is in; all ranks must ask. None for a group of one."""
        if count == 1:
            return None
        mine, _ = dist.new_subgroups(count)
        return mine

    def any(self, here: bool, device: torch.device) -> bool:
        """Whether it is so on any rank; all of them must ask."""
        if self.size == 1:
            return here
        found = torch.tensor(int(here), device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, anything that pickles, on all of them."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()


SINGLE_PROCESS = World()


def join(device: torch.device) -> World:
    """Join the ranks that torchrun started, if it did; NCCL on GPUs, Gloo elsewhere. InputError if that fails."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return SINGLE_PROCESS
    ranks = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        if ranks.local >= torch.cuda.device_count():
            raise InputError(
                f"rank {ranks.rank} is process {ranks.local} of its machine, which has {torch.cuda.device_count()} "
                "GPUs: give torchrun as many --nproc-per-node as there are GPUs"
            )
        torch.cuda.set_device(ranks.local)
    store, start = meet(COLLECTIVE_TIMEOUT)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
    return replace(ranks, start=start)


def leave() -> None:
    """End the connection, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
