"""The gradient of a prefix of a weight, which is added to main_grad or to a new full-size gradient."""

import torch
from torch import Tensor

from .sums import sums


def add_to_prefix(prefix: Tensor, partial: Tensor) -> None:
    """Add the sum of partial [programs, O, C] over programs to prefix, [O, C] or [O, C, 1, 1]."""
    nothing = partial.new_empty(0, partial.shape[2])
    sums(nothing, nothing, 0, prefix, partial)


def gradient_prefix(
    weight: Tensor, main_grad: Tensor | None, out_channels: int, channels: int
) -> tuple[Tensor, Tensor]:
    """The prefix to add a gradient to, and the gradient that a backward returns: empty with main_grad."""
    if main_grad is not None:
        return main_grad[:out_channels, :channels], weight.new_empty(0)
    zeros = torch.zeros_like(weight)
    return zeros[:out_channels, :channels], zeros
