"""The sum of all ranks' gradients: one all-reduce after the backward pass, or several while it still computes.

The backward pass of the full network, the last of a step, completes the flat gradient from its end to its beginning:
predictor, projector, last stage of the encoder, and so on. In that order pieces of it can be on their way early.
"""

from __future__ import annotations

from collections.abc import Callable

from ..pretraining.flat_buffers import FlatBuffers
from .process_group import World

PIECE = 0.1  # share of the gradient that is worth a message of its own: a late stage has a multiple, an early one less


class GradientAllReduce:
    """Of the gradients in an flat buffers. Every rank makes the same calls in the same order."""

    def __init__(self, flat: FlatBuffers, ranks: World) -> None:
        self._arena = flat
        self._ranks = ranks
        self._begun: list[Callable[[], object]] = []
        self._left = len(flat.grads)  # the elements before this one have not been sent

    def complete(self, part: str) -> None:
        """All gradients from a module of the online network on are what they will be: send them if they are enough."""
        start = self._arena.start(part)
        if self._left - start >= PIECE * len(self._arena.grads):
            self._send_from(start)

    def finish(self) -> None:
        """All gradients are complete: when this returns, they are the sum."""
        if self._left:
            self._send_from(0)
        for wait in self._begun:
            wait()
        self._begun.clear()
        self._left = len(self._arena.grads)

    def _send_from(self, start: int) -> None:
        self._begun.append(self._ranks.begin_sum(self._arena.grads[start : self._left]))
        self._left = start
