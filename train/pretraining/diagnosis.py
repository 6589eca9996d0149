"""Where in a step the first number that is not finite appears."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dspnet_fast.subnets import Subnet

from .dspnet import DSPNet
from .flat_buffers import FlatBuffers


class Finding(NamedTuple):
    """subnet: "target", or the online subnet's name, or "all" for what does not belong to one. layer: a module or
    parameter by its name. where: "weights", "images", "forward" or "backward"."""

    subnet: str
    layer: str
    where: str

    def __str__(self) -> str:
        return f"{self.layer} of {self.subnet} ({self.where})"


@torch.no_grad()
def find(
    model: DSPNet, flat: FlatBuffers, images: Tensor, subnets: Sequence[Subnet], alpha: float | Tensor
) -> Finding | None:
    """Repeat a step's passes, without its update, until something is not finite; None if all is.

    images: normalised views [2B, 3, H, W]. Gradients are zero afterwards, running statistics as they were.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not finite(tensor):
            return Finding("all", name, "weights")
    if not finite(images):
        return Finding("all", "the images", "images")
    statistics = flat.statistics.clone()
    try:
        with _first_bad_output(model.target) as bad:
            targets = model.targets(images, alpha)
        if bad:
            return Finding("target", bad[0], "forward")
        for subnet in subnets:
            flat.grads.zero_()
            with torch.enable_grad(), _first_bad_output(model.online) as bad:
                loss = model.loss(images, targets, subnet)
            if bad or not finite(loss):
                return Finding(subnet.name, bad[0] if bad else "the loss", "forward")
            loss.backward()
            # the backward pass comes from the end, so the last of them was the first
            for name, parameter in reversed(list(model.online.named_parameters())):
                if parameter.grad is not None and not finite(parameter.grad):
                    return Finding(subnet.name, name, "backward")
        return None
    finally:
        flat.grads.zero_()
        flat.statistics.copy_(statistics)


def finite(value: Any) -> bool:
    """Whether all numbers are in a tensor, or in the tensors of a dataclass such as an deferred activation."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if is_dataclass(value):
        return all(finite(getattr(value, field.name)) for field in fields(value))
    return True


@contextmanager
def _first_bad_output(root: nn.Module) -> Iterator[list[str]]:
    """A list that gets the names of modules whose output is not finite, in the order in which they compute."""
    bad: list[str] = []

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not bad and not finite(output):
                bad.append(name)

        return module.register_forward_hook(look)

    handles = [watch(name, module) for name, module in root.named_modules() if name]
    try:
        yield bad
    finally:
        for handle in handles:
            handle.remove()
