"""CUDA graphs of the passes of a training step: thousands of launches captured once and then replayed.

There is one graph for the target and one per subnet for its forward and backward pass. They read and write static
tensors: the batch, the normalised images, the targets, the losses, the flat buffers, alpha. All other memory comes from
one pool that the graphs share: nothing in it is used after its graph has run, so they may run in any order.
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
from .dspnet import DSPNet, Taught
from .flat_buffers import FlatBuffers

WARM_UP = 3  # runs before the capture, in which libraries choose algorithms and kernels are compiled

# Runs functions a few times and returns replacements that repeat each one's work on the same tensors.
Capture = Callable[[Sequence[Callable[[], object]]], Sequence[Callable[[], object]]]


class StepGraphs:
    """The passes of a step on batches of one shape. The capture leaves the state of the run unchanged.

    Args:
        model: the networks; their parameters are views of `flat`.
        flat: parameters, gradients, momentum, target and statistics.
        batch: an example batch, see `Trainer.train_step`.
        alpha: scalar on the device, read by every replay; see `DSPNet.targets`.
        capture: how to capture; by default as CUDA graphs.
        taught: targets of the teacher for `batch`; None without a teacher.

    Attributes:
        target: computes the targets of the static batch.
        subnets: forward and backward pass of each subnet, by name.

    Raises RuntimeError if a pass cannot be captured.
    """

    def __init__(
        self,
        model: DSPNet,
        flat: FlatBuffers,
        batch: Tensor,
        alpha: Tensor,
        capture: Capture | None = None,
        taught: Taught | None = None,
    ) -> None:
        device = flat.params.device
        self._model, self._alpha = model, alpha
        self._batch = _to_rgb(batch).to(device, copy=True)
        self._images = prepare(self._batch, device).clone()
        self._taught = None if taught is None else taught.each(Tensor.clone)
        self._losses = {subnet.name: torch.zeros((), device=device) for subnet in model.family}
        with _state_restored(model, flat):
            self._targets = model.targets(self._images, alpha)
            passes: list[Callable[[], object]] = [self._run_target]
            passes += [partial(self._run_subnet, subnet) for subnet in model.family]
            self.target, *subnets = (capture or capture_graphs)(passes)
            self.subnets = dict(zip(model.family.names, subnets, strict=True))

    def _run_target(self) -> None:
        self._images.copy_(prepare(self._batch, self._images.device))
        self._targets.copy_(self._model.targets(self._images, self._alpha))

    def _run_subnet(self, subnet: Subnet) -> None:
        self._losses[subnet.name].copy_(
            self._model.accumulate_subnet(self._images, self._targets, subnet, self._taught)
        )

    def accumulate(self, batch: Tensor, subnets: Sequence[Subnet], taught: Taught | None = None) -> dict[str, Tensor]:
        """As `DSPNet.accumulate`, on the batch before normalisation.

        Raises RuntimeError for a batch of another shape than the captured one.
        """
        if _to_rgb(batch).shape != self._batch.shape:
            raise RuntimeError(
                f"the step was captured for batches of {list(self._batch.shape)}, not {list(batch.shape)}"
            )
        # Copy first, expand to RGB on the GPU: expanding on the host gives unpinned memory, and the copy would block.
        self._batch.copy_(_to_rgb(batch.to(self._batch.device, non_blocking=True)))
        if self._taught is not None:
            assert taught is not None
            _copy(self._taught, taught)
        self.target()
        for subnet in subnets:
            self.subnets[subnet.name]()
        return {subnet.name: self._losses[subnet.name].clone() for subnet in subnets}


def captured(
    model: DSPNet, flat: FlatBuffers, alpha: Tensor, capture: Capture | None = None
) -> Callable[[Tensor, Sequence[Subnet], Taught | None], dict[str, Tensor]]:
    """`StepGraphs.accumulate`, captured at the first call for the shape of its batch."""
    graphs: StepGraphs | None = None

    def accumulate(batch: Tensor, subnets: Sequence[Subnet], taught: Taught | None) -> dict[str, Tensor]:
        nonlocal graphs
        graphs = graphs or StepGraphs(model, flat, batch, alpha, capture, taught)
        return graphs.accumulate(batch, subnets, taught)

    return accumulate


class CapturedFunction:
    """A teacher's function of one tensor, without gradients, captured at the first call for its argument's shape.

    Args:
        function: maps a tensor to new ones.
        capture: how to capture; by default as CUDA graphs.
    """

    def __init__(self, function: Callable[[Tensor], Taught], capture: Capture | None = None) -> None:
        self._function = function
        self._capture = capture
        self._argument: Tensor | None = None

    def __call__(self, argument: Tensor) -> Taught:
        """The function's value, which the next call overwrites."""
        if self._argument is None or self._argument.shape != argument.shape:
            self._argument = argument.clone()
            self._value = self._function(self._argument)
            (self._replay,) = (self._capture or capture_graphs)([self._run])
        self._argument.copy_(argument)
        self._replay()
        return self._value

    def _run(self) -> None:
        assert self._argument is not None
        _copy(self._value, self._function(self._argument))


def _copy(destination: Taught, source: Taught) -> None:
    """Copy each tensor."""
    for to, value in zip(destination, source, strict=True):
        if to is not None and value is not None:
            to.copy_(value)


def _to_rgb(batch: Tensor) -> Tensor:
    """[N, 3, H, W], also of an 8-bit batch of greyscale images, [N, 1, H, W]; float batches stay as they are."""
    return batch if batch.is_floating_point() else batch.expand(-1, 3, -1, -1)


def capture_graphs(functions: Sequence[Callable[[], object]]) -> list[Callable[[], object]]:
    """Replays of CUDA graphs of the functions, all in one memory pool.

    All functions run before the first capture: a captured graph keeps its memory for the pool, and running the next
    function outside the pool would need as much again.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for function in functions:
            for _ in range(WARM_UP):
                function()
    torch.cuda.current_stream().wait_stream(stream)
    pool = torch.cuda.graph_pool_handle()
    return [_capture(function, pool) for function in functions]


def _capture(function: Callable[[], object], pool: Any) -> Callable[[], object]:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # Other threads continue: a stricter mode would fail when one of them pins memory for the next batch.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            function()
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # torch leaves the capture stream current
        raise RuntimeError(
            f"the training step cannot be captured as CUDA graphs; train with --no-cuda-graphs: {error}"
        ) from error
    return graph.replay


@contextmanager
def _state_restored(model: DSPNet, flat: FlatBuffers) -> Iterator[None]:
    """Restore parameters, gradients, momentum, targets and buffers on exit."""
    flats = (flat.params, flat.grads, flat.momenta, flat.targets)
    before = [(tensor, tensor.clone()) for tensor in (*flats, *model.buffers())]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
