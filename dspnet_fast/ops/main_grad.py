"""main_grad: an optional buffer of a weight's shape to which the gradient of a prefix is added in place. Without it,
autograd gets a full-size gradient that is zero outside the prefix.
"""

import torch
from torch import Tensor


def alike(main_grad: Tensor | None, weight: Tensor | None) -> bool:
    """Whether main_grad is None or has the weight's shape and dtype."""
    if main_grad is None:
        return True
    return weight is not None and main_grad.shape == weight.shape and main_grad.dtype == weight.dtype


def check_main_grad(operator: str, weight: Tensor, main_grad: Tensor | None) -> None:
    """Raise RuntimeError unless main_grad is None or has the weight's shape and dtype."""
    if not alike(main_grad, weight):
        expected = f"{list(weight.shape)} {weight.dtype}"
        raise RuntimeError(f"{operator}: main_grad must have the shape and dtype of weight, {expected}")


def gradient_buffer(weight: Tensor, main_grad: Tensor | None) -> tuple[Tensor, Tensor]:
    """The buffer to add the gradient of a prefix to, and the gradient to return.

    With main_grad these are main_grad and an empty tensor; otherwise both are the same new tensor of zeros.
    """
    if main_grad is not None:
        return main_grad, weight.new_empty(0)
    zeros = torch.zeros_like(weight)
    return zeros, zeros
