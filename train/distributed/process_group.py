"""The process group: the processes that torchrun started to train together, or a single process.

Every rank holds all weights and computes its share of each batch. A step has one all-reduce of the flat gradient
(several, of disjoint pieces, with --overlap-all-reduce) and one of batch normalisation's running statistics. Therefore
weights and statistics are the same on all ranks after every step, and any rank could write the checkpoint.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dspnet_fast.errors import InputError

from .rendezvous import rendezvous

# Rank 0 may be measuring or writing a checkpoint while the others wait in a collective.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
EVALUATION_TIMEOUT = timedelta(days=1)  # rank 0 measures statistics while the others wait
REFUSAL_SECONDS = 30.0  # until torchrun ends the ranks that wait for rank 0 to refuse

Item = TypeVar("Item")


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

    def gather_in_order(self, items: Iterable[Item], count: int) -> Iterator[Item]:
        """Collect items of all ranks on rank 0. A collective per `size` items.

        Args:
            items: this rank's items: of `count` items those with the indices rank, rank + size, rank + 2 size, ...
            count: number of items of all ranks.

        Yields:
            On rank 0 all items in the order of their indices, on the other ranks nothing.
        """
        mine = iter(items)
        for start in range(0, count, self.size):
            item = next(mine) if start + self.rank < count else None
            gathered: list[Any] | None = [item] * self.size if self.is_main else None
            if self.size > 1:
                dist.gather_object(item, gathered)
            yield from (gathered or [])[: count - start]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            # NCCL would otherwise guess the GPU from the rank, and create a context on it.
            dist.barrier(device_ids=[self.local_rank] if dist.get_backend() == "nccl" else None)


SINGLE_PROCESS = World()


def launched_ranks() -> int:
    """Number of processes that torchrun started; 1 without torchrun."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 1:
        raise InputError(f"the environment variable WORLD_SIZE is {size!r}: unset it, or start processes with torchrun")
    return int(size)


def refuse_ranks(reason: str) -> None:
    """Raise InputError on rank 0 if torchrun started several processes; the other ranks end without a message."""
    if launched_ranks() == 1:
        return
    if os.environ.get("RANK", "0") != "0":
        time.sleep(REFUSAL_SECONDS)  # torchrun ends all ranks when rank 0 has printed the reason
        sys.exit(2)
    raise InputError(f"{reason}, and torchrun started {launched_ranks()}: start it without torchrun")


def init_process_group(
    device: torch.device, backend: str | None = None, timeout: timedelta = COLLECTIVE_TIMEOUT
) -> World:
    """Join the process group described by torchrun's environment variables.

    Args:
        device: of this rank.
        backend: of the collectives; by default NCCL on GPUs and Gloo elsewhere.
        timeout: of a collective.

    Returns:
        This rank's place; SINGLE_PROCESS without torchrun.

    Raises:
        InputError: this rank has no GPU of its own.
    """
    size = launched_ranks()
    if size == 1:
        return SINGLE_PROCESS
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise InputError(
            f"the environment variable WORLD_SIZE is {size}, but {', '.join(missing)} missing: start several processes "
            "with torchrun, or unset WORLD_SIZE"
        )
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
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=size, timeout=timeout)
    return replace(world, launch_id=launch_id)


def init_sharing(device: torch.device) -> tuple[World, torch.device]:
    """Join the process group of a command whose ranks share the computation of features, by Gloo.

    Only rank 0 prints from here on.

    Returns:
        This rank's place, and its own device.
    """
    world = init_process_group(device, "gloo", EVALUATION_TIMEOUT)
    if not world.is_main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
    return world, torch.device("cuda", world.local_rank) if device.type == "cuda" and world.size > 1 else device


def end_sharing(world: World) -> None:
    """Leave the process group; the other ranks than rank 0 end here. Call it after the last features."""
    if world.size > 1:
        world.barrier()
        destroy_process_group()
        if not world.is_main:
            sys.exit(0)


def destroy_process_group() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
