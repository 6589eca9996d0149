"""main_grad: a buffer like a weight, to whose prefix gradients are added in place. Where there is none, autograd gets
a gradient of full size, zero outside the prefix.
"""

import torch
from torch import Tensor


def alike(main_grad: Tensor | None, weight: Tensor | None) -> bool:
    """Whether the buffer, if there is one, has the weight's shape and dtype."""
    if main_grad is None:
        return True
    return weight is not None and main_grad.shape == weight.shape and main_grad.dtype == weight.dtype


def check_main_grad(operator: str, weight: Tensor, main_grad: Tensor | None) -> None:
    """Raise RuntimeError unless they are alike."""
    torch._check(
        alike(main_grad, weight),
        lambda: f"{operator}: main_grad must be like weight, {list(weight.shape)} {weight.dtype}",
    )


def gradient_buffer(weight: Tensor, main_grad: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the gradient of a prefix is added to, and what a backward returns: an empty tensor if that is main_grad."""
    if main_grad is not None:
        return main_grad, weight.new_empty(0)
    zeros = torch.zeros_like(weight)
    return zeros, zeros
