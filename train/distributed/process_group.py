"""The process group: the processes that torchrun started to train together, or a single process.

Every rank holds all weights and computes its share of each batch. A step has one all-reduce of the flat gradient
(several, of disjoint pieces, with --overlap-all-reduce) and one of batch normalisation's running statistics. Therefore
weights and statistics are the same on all ranks after every step, and any rank could write the checkpoint.
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

from .rendezvous import rendezvous

# Rank 0 may be measuring or writing a checkpoint while the others wait in a collective.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process's place in the process group, and the collectives that training uses.

    Attributes:
        rank: index of this process, 0 to size - 1.
        size: number of processes.
        local_rank: index of this process on its machine, which is also the index of its GPU.
        launch_id: identifier of this launch: the same on all ranks, different after a restart of the job.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launch_id: str = ""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes files."""
        return self.rank == 0

    def all_reduce_async(self, tensor: Tensor) -> Callable[[], object]:
        """Start replacing a tensor by its sum over the ranks, in place; the returned function waits for the end."""
        if self.size == 1:
            return lambda: None
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None
        return work.wait

    def all_reduce_mean(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size

    def subgroup(self, count: int) -> dist.ProcessGroup | None:
        """The group of `count` consecutive ranks that holds this rank, or None for a group of one. A collective."""
        if count == 1:
            return None
        group, _ = dist.new_subgroups(count)
        return group

    def any(self, value: bool, device: torch.device) -> bool:
        """Whether `value` is true on any rank."""
        if self.size == 1:
            return value
        flag = torch.tensor(int(value), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in the order of ranks; they must pickle."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            # NCCL would otherwise guess the GPU from the rank, and create a context on it.
            dist.barrier(device_ids=[self.local_rank] if dist.get_backend() == "nccl" else None)


SINGLE_PROCESS = World()


def init_process_group(device: torch.device) -> World:
    """Join the process group described by torchrun's environment variables: NCCL on GPUs, Gloo elsewhere.

    Returns SINGLE_PROCESS without torchrun. Raises InputError if this rank has no GPU of its own.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return SINGLE_PROCESS
    world = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "mps":
        raise InputError(f"{size} processes with --device mps: Apple's GPUs have no collectives; use one process")
    if device.type == "cuda":
        if world.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"rank {world.rank} is process {world.local_rank} of its machine, which has "
                f"{torch.cuda.device_count()} GPUs: give torchrun as many --nproc-per-node as there are GPUs"
            )
        torch.cuda.set_device(world.local_rank)
    store, launch_id = rendezvous(COLLECTIVE_TIMEOUT)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
    return replace(world, launch_id=launch_id)


def destroy_process_group() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
