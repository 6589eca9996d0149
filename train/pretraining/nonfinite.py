"""Non-finite steps: skipped and counted without a host synchronisation, and traced to the first non-finite number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dspnet_fast.subnets import Subnet

from .dspnet import DSPNet, Taught
from .flat_buffers import FlatBuffers

MAX_IN_A_ROW = 3  # consecutive skipped steps after which the run ends; more with fp16, see loss_scale.py


class Skipped(NamedTuple):
    """Counts of skipped steps: the current and the longest consecutive run, all, and steps since the last one."""

    in_a_row: int
    longest_row: int
    total: int
    since: int


class Guard:
    """Skips the update of a step whose gradient or running statistics are not finite, and restores the statistics.

    The gradient alone is not enough: an activation beyond 1e19 has no variance in fp32, and yet the gradient may be
    finite. Everything happens on the device. Call `begin` before the forward passes, `check` before the update, which
    applies only if `finite`, and `finish` after it.

    Attributes:
        finite: bool scalar on the device, whether the last checked step was finite.
        counts: int64 [4] on the device, the fields of `Skipped`.
    """

    def __init__(self, flat: FlatBuffers) -> None:
        self._flat = flat
        self._before = flat.statistics.clone()
        device = flat.params.device
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)

    def begin(self) -> None:
        """Save the running statistics."""
        self._before.copy_(self._flat.statistics)

    @torch.no_grad()
    def check(self) -> None:
        """Test gradient and statistics: a sum is NaN or infinite if one of its terms is."""
        self.finite.copy_(self._flat.grads.sum().isfinite() & self._flat.statistics.sum().isfinite())

    @torch.no_grad()
    def finish(self) -> None:
        """Update the counts, and restore the statistics if the step was skipped."""
        statistics, skipped = self._flat.statistics, (~self.finite).long()
        torch.where(self.finite, statistics, self._before, out=statistics)
        in_a_row, longest, total, since = self.counts.unbind()
        in_a_row.add_(1).mul_(skipped)
        torch.maximum(longest, in_a_row, out=longest)
        total.add_(skipped)
        since.add_(1).mul_(self.finite)

    def skipped(self) -> Skipped:
        """The counts; waits for the device."""
        return Skipped(*self.counts.tolist())

    def restart(self, total: int) -> None:
        """Continue from a checkpoint that had skipped `total` steps."""
        self.counts.copy_(torch.tensor([0, 0, total, 0]))


class Finding(NamedTuple):
    """The place of the first non-finite number.

    subnet: "teacher", "target", the online subnet's name, or "all". layer: name of a module or parameter. where:
    "weights", "images", "forward" or "backward".
    """

    subnet: str
    layer: str
    where: str

    def __str__(self) -> str:
        return f"{self.layer} of {self.subnet} ({self.where})"


@torch.no_grad()
def find_nonfinite(
    model: DSPNet,
    flat: FlatBuffers,
    images: Tensor,
    subnets: Sequence[Subnet],
    alpha: float | Tensor,
    taught: Taught | None = None,
) -> Finding | None:
    """Repeat the passes of a step, without the update, until a number is not finite; None if all are finite.

    No rank waits for another one. Gradients are zero afterwards; running statistics are unchanged.

    Args:
        images: normalised views, [2B, 3, H, W].
        subnets, alpha, taught: see `DSPNet.accumulate`.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not finite(tensor):
            return Finding("all", name, "weights")
    if not finite(images):
        return Finding("all", "the images", "images")
    if taught is not None and not all(map(finite, taught)):
        return Finding("teacher", "the features", "forward")
    names = {module: name for root in (model.target, model.online) for name, module in root.named_modules() if name}
    found: list[str] = []

    def after_forward(module: nn.Module, inputs: Any, output: Any) -> None:
        if not found and not finite(output):
            found.append(names[module])

    statistics = flat.statistics.clone()
    groups = [(norm, norm.process_group) for norm in model.batch_norms()]
    handles = [module.register_forward_hook(after_forward) for module in names]
    try:
        for norm, _ in groups:
            norm.process_group = None
        targets = model.targets(images, alpha)
        if found:
            return Finding("target", found[0], "forward")
        for subnet in subnets:
            flat.grads.zero_()
            with torch.enable_grad():
                loss = model.accumulate_subnet(images, targets, subnet, taught)
            if found or not finite(loss):
                return Finding(subnet.name, found[0] if found else "the loss", "forward")
            # The backward pass runs from the last parameter to the first, so the last non-finite one was the first.
            for name, parameter in reversed(list(model.online.named_parameters())):
                if parameter.grad is not None and not finite(parameter.grad):
                    return Finding(subnet.name, name, "backward")
        return None
    finally:
        for handle in handles:
            handle.remove()
        for norm, group in groups:
            norm.process_group = group
        flat.grads.zero_()
        flat.statistics.copy_(statistics)


def finite(value: Any) -> bool:
    """Whether all numbers are finite in a tensor, or in the tensors of a dataclass such as `Deferred`."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if is_dataclass(value):
        return all(finite(getattr(value, field.name)) for field in fields(value))
    return True
