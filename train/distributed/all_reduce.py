"""The all-reduce of the flat gradient: once after the backward passes, or in pieces while the last one still runs.

The backward pass of the full network, which is the last of a step, finishes the flat gradient from its end to its
beginning: predictor, projector, last stage of the encoder, and so on. Pieces can be sent in that order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dspnet_fast.nn.deferred import Activation, Deferred

from ..pretraining.flat_buffers import FlatBuffers
from .process_group import World

MIN_PIECE = 0.1  # share of the gradient from which a piece is sent early: smaller messages cost more than they overlap


class GradientAllReduce:
    """Sums the gradients in flat buffers over the ranks. Every rank makes the same calls in the same order.

    Args:
        flat: the flat buffers; `grads` is reduced in place.
        world: the process group.
    """

    def __init__(self, flat: FlatBuffers, world: World) -> None:
        self._flat = flat
        self._world = world
        self._pending: list[Callable[[], object]] = []
        self._unsent = len(flat.grads)  # elements before this index have not been sent
        self._passes, self._encoder_passes = 0, 1
        self._done: Counter[str] = Counter()

    def overlap(self, online: nn.Module, modules: list[str]) -> None:
        """From now on, send pieces while the last backward pass of a step runs.

        Args:
            online: the module whose gradients are reduced.
            modules: submodules in the order of the forward pass. The gradients of a module and of all later ones are
                final once its input gradient exists in the last backward pass.
        """

        def watch(name: str) -> Callable[[nn.Module, tuple[Activation]], None]:
            def before_forward(module: nn.Module, inputs: tuple[Activation]) -> None:
                x: Tensor = inputs[0].x if isinstance(inputs[0], Deferred) else inputs[0]
                if torch.is_grad_enabled() and x.requires_grad:
                    x.register_hook(lambda gradient: self.gradient_ready(name))

            return before_forward

        for name in modules:
            online.get_submodule(name).register_forward_pre_hook(watch(name))

    def begin(self, passes: int, encoder_passes: int = 1) -> None:
        """Begin a step of this many backward passes, each with `encoder_passes` passes of the encoder."""
        self._passes, self._encoder_passes = passes, encoder_passes
        self._done.clear()

    def gradient_ready(self, module: str) -> None:
        """Gradient-ready hook: one backward pass has reached the input of a module."""
        self._done[module] += 1
        if self._done[module] != self._passes * (self._encoder_passes if module.startswith("encoder.") else 1):
            return
        start = self._flat.start(module)
        if self._unsent - start >= MIN_PIECE * len(self._flat.grads):
            self._send_from(start)

    def finish(self) -> None:
        """End a step: on return `grads` holds the sum over the ranks."""
        if self._unsent:
            self._send_from(0)
        for wait in self._pending:
            wait()
        self._pending.clear()
        self._unsent = len(self._flat.grads)
        self._passes = 0

    def _send_from(self, start: int) -> None:
        self._pending.append(self._world.all_reduce_async(self._flat.grads[start : self._unsent]))
        self._unsent = start
