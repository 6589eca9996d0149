"""slim_linear: a linear layer by a prefix of a weight, read and given its gradient in place.

The native body hands the prefix to the BLAS by its strides, and the BLAS adds the gradient to main_grad's prefix:
little is left for another provider to save.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import triton
from .main_grad import check_main_grad, gradient_buffer
from .registry import operator


@operator()
def slim_linear(x: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor | None, out_features: int) -> Tensor:
    """x weight[:out_features, :I]^T + bias.

    x: [..., I]. weight: [O, I'], or [O, I', 1, 1] as pointwise convolutions have it, of which a prefix is used.
    bias: [out_features] or None. main_grad: a buffer like weight that the gradient of the prefix is added to; without
    one, a full-size gradient is returned to autograd. Returns [..., out_features] in x's dtype. Raises RuntimeError for
    other shapes and for a prefix that the weight does not have.
    """
    _check(x, weight, bias, main_grad, out_features)
    return F.linear(x, _prefix(weight, out_features, x.shape[-1]), bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor | None, out_features: int) -> None:
    torch._check(
        x.ndim > 0 and weight.ndim in (2, 4) and weight.shape[2:].numel() == 1,
        lambda: f"slim_linear: weight must be [O, I] or [O, I, 1, 1], got {list(weight.shape)}",
    )
    torch._check(
        0 < out_features <= weight.shape[0] and 0 < x.shape[-1] <= weight.shape[1],
        lambda: f"slim_linear: a weight of {list(weight.shape)} has no prefix of {out_features} x {x.shape[-1]}",
    )
    check_main_grad("slim_linear", weight, main_grad)
    torch._check(
        bias is None or bias.shape == (out_features,),
        lambda: f"slim_linear: bias must be [{out_features}], got {None if bias is None else list(bias.shape)}",
    )


def _prefix(weight: Tensor, out_features: int, in_features: int) -> Tensor:
    return (weight if weight.ndim == 2 else weight[:, :, 0, 0])[:out_features, :in_features]


@operator(mutates=("main_grad",))
def slim_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    main_grad: Tensor | None,
    input_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of slim_linear for x, weight (full size, zero outside the prefix) and bias.

    Empty: those not asked for, and weight's with main_grad, to whose prefix it is added instead.
    """
    rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    of_x, of_bias = x.new_empty(0), x.new_empty(0)
    if input_gradient:
        of_x = (rows @ _prefix(weight, rows.shape[1], inputs.shape[1])).view(x.shape)
    if weight_gradient:
        buffer, of_weight = gradient_buffer(weight, main_grad)
        _prefix(buffer, rows.shape[1], inputs.shape[1]).addmm_(rows.t(), inputs)
    else:
        of_weight = weight.new_empty(0)
    if bias_gradient:
        of_bias = rows.sum(0)
    return of_x, of_weight, of_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.main_grad, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    of_x, of_weight, of_bias = slim_linear_backward(grad, x, weight, ctx.main_grad, *needs)
    return (
        of_x if needs[0] else None,
        of_weight if needs[1] and ctx.main_grad is None else None,
        of_bias if needs[2] else None,
        None,
        None,
    )


slim_linear.register_autograd(_backward, _setup_context)


def _accepts(x: Tensor, weight: Tensor) -> tuple[bool, str]:
    return triton.kernels("slim_linear").accepts(x, weight)


@slim_linear.provider(
    "triton",
    devices=triton.DEVICES,
    supported=triton.supported,
    accepts=_accepts,
    only_by_name="the BLAS reads the prefix in place as well, so only by name",
)
def _triton(x: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor | None, out_features: int) -> Tensor:
    _check(x, weight, bias, main_grad, out_features)
    return triton.kernels("slim_linear").slim_linear(x, weight, bias, out_features)


@slim_linear_backward.provider(
    "triton",
    devices=triton.DEVICES,
    supported=triton.supported,
    accepts=_accepts,
    only_by_name="the BLAS reads the prefix in place as well, so only by name",
)
def _triton_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return triton.kernels("slim_linear").slim_linear_backward(*args)
