"""CUDA graphs of a training step: its thousands of launches recorded once, and from then on replayed by a few calls.

There is one graph for the target, one per subnet for forward and backward pass, one for the update. They read and
write tensors that stay where they are: the batch, the normalised images, the targets, the losses, the flat buffers,
scalars.
Everything else they need comes out of one pool of memory that they share: nothing in it is used after its graph has
run, so they may follow each other in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dspnet_fast.subnets import Subnet

from ..data.normalization import prepare
from .dspnet import DSPNet
from .flat_buffers import FlatBuffers

WARM_UP = 3  # runs before recording, in which libraries choose algorithms and kernels are compiled

# Runs functions a few times and returns what repeats each, with the same tensors, without calling it.
Recorder = Callable[[Sequence[Callable[[], object]]], Sequence[Callable[[], object]]]


class StepGraphs:
    """A step of a model on batches of one shape, recorded. Recording leaves no trace in the state of the run.

    Args:
        model: the networks; their parameters lie in `flat`.
        flat: parameters, gradients, momentum and target.
        batch: a batch as the run has them: see `Trainer.train_step`.
        alpha: see `DSPNet.targets`: a scalar on the device, read by every replay.
        update: the update of the flat buffers; reads what changes from step to step from the device.
        record: how to record; by default as CUDA graphs.
        counts: what the update writes besides the flat buffers.

    Raises RuntimeError if a part of the step cannot be recorded.
    """

    def __init__(
        self,
        model: DSPNet,
        flat: FlatBuffers,
        batch: Tensor,
        alpha: Tensor,
        update: Callable[[], None],
        record: Recorder | None = None,
        counts: Tensor | None = None,
    ) -> None:
        device = flat.params.device
        self._model, self._alpha = model, alpha
        self._batch = _coloured(batch).to(device, copy=True)
        self._images = prepare(self._batch, device).clone()
        self._losses = {subnet.name: torch.zeros((), device=device) for subnet in model.family}
        with _unharmed(model, flat, counts):
            self._targets = model.targets(self._images, alpha)
            passes = [partial(self._run_subnet, subnet) for subnet in model.family]
            self._find_targets, *replays, self._update = (record or record_graphs)([self._run_target, *passes, update])
            self._train = dict(zip(model.family.names, replays, strict=True))

    def _run_target(self) -> None:
        self._images.copy_(prepare(self._batch, self._images.device))
        self._targets.copy_(self._model.targets(self._images, self._alpha))

    def _run_subnet(self, subnet: Subnet) -> None:
        loss = self._model.loss(self._images, self._targets, subnet)
        loss.backward()
        self._losses[subnet.name].copy_(loss.detach())

    def accumulate(self, batch: Tensor, subnets: Sequence[Subnet]) -> dict[str, Tensor]:
        """As DSPNet.accumulate, on the batch before normalisation.

        Raises RuntimeError for a batch of another shape than that of the recording.
        """
        if _coloured(batch).shape != self._batch.shape:
            raise RuntimeError(
                f"the step was recorded for batches of {list(self._batch.shape)}, not {list(batch.shape)}"
            )
        # across first, coloured there: a copy of both at once goes through memory that is not pinned, and waits
        self._batch.copy_(_coloured(batch.to(self._batch.device, non_blocking=True)))
        self._find_targets()
        for subnet in subnets:
            self._train[subnet.name]()
        return {subnet.name: self._losses[subnet.name].clone() for subnet in subnets}

    def update(self) -> None:
        """Everything after the last backward."""
        self._update()


def _coloured(batch: Tensor) -> Tensor:
    """[N, 3, H, W], also of a batch in which all images happen to be grey, [N, 1, H, W]."""
    return batch.expand(-1, 3, -1, -1)


def record_graphs(functions: Sequence[Callable[[], object]]) -> list[Callable[[], object]]:
    """CUDA graphs of the functions, all out of one pool of memory.

    All run before the first is recorded: what one has recorded is kept for the pool, and the next would need as much
    again to run.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for function in functions:
            for _ in range(WARM_UP):
                function()
    torch.cuda.current_stream().wait_stream(stream)
    pool = torch.cuda.graph_pool_handle()
    return [_record(function, pool) for function in functions]


def _record(function: Callable[[], object], pool: Any) -> Callable[[], object]:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # other threads go on: one that pins memory for batches would make a stricter mode fail
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            function()
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # torch leaves the stream of the recording current
        raise RuntimeError(
            f"the training step cannot be recorded as CUDA graphs; --no-cuda-graphs trains without: {error}"
        ) from error
    return graph.replay


@contextmanager
def _unharmed(model: DSPNet, flat: FlatBuffers, counts: Tensor | None) -> Iterator[None]:
    """Puts parameters, gradients, momentum, targets, all buffers and counts back to what they were."""
    flats = (flat.params, flat.grads, flat.momenta, flat.targets)
    before = [(tensor, tensor.clone()) for tensor in (*flats, *model.buffers(), *([] if counts is None else [counts]))]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
