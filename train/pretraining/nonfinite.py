"""A step whose numbers are not finite is no step: it is skipped and counted, without asking the device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .flat_buffers import FlatBuffers

TOO_MANY = 3  # in a row: then it is no accident


class Skipped(NamedTuple):
    """Skipped steps: in a row until now, the longest such row, and in all; and the steps since the last one."""

    in_a_row: int
    longest_row: int
    in_all: int
    since: int


class Guard:
    """Judges each step of an flat buffers by its gradient and its running statistics, and undoes what a step that is
    skipped
    did to these. An activation beyond 1e19 has no variance in fp32, and yet the gradient may be finite.

    Everything happens on the device, so a CUDA graph can hold it. `begin` before the forward passes, `judge` before the
    update, which applies only if `finite`, and `settle` after it.

    Attributes:
        finite: a bool scalar, whether all were.
        counts: int64 [4], as `Skipped`.
    """

    def __init__(self, flat: FlatBuffers) -> None:
        self._arena = flat
        self._before = flat.statistics.clone()
        device = flat.params.device
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)

    def begin(self) -> None:
        """Keep the running statistics as they are."""
        self._before.copy_(self._arena.statistics)

    @torch.no_grad()
    def judge(self) -> None:
        """Look at them. A sum is NaN or infinite if one of its terms is."""
        self.finite.copy_(self._arena.grads.sum().isfinite() & self._arena.statistics.sum().isfinite())

    @torch.no_grad()
    def settle(self) -> None:
        """Count, and put the statistics back if the step was skipped."""
        statistics, skipped = self._arena.statistics, (~self.finite).long()
        torch.where(self.finite, statistics, self._before, out=statistics)
        in_a_row, longest, in_all, since = self.counts.unbind()
        in_a_row.add_(1).mul_(skipped)
        torch.maximum(longest, in_a_row, out=longest)
        in_all.add_(skipped)
        since.add_(1).mul_(self.finite)

    def skipped(self) -> Skipped:
        """What was counted; waits for the device."""
        return Skipped(*self.counts.tolist())

    def restart(self, in_all: int) -> None:
        """Go on from a checkpoint."""
        self.counts.copy_(torch.tensor([0, 0, in_all, 0]))
