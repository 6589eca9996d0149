"""slim_linear: a linear layer with a prefix of a weight, which it reads and whose gradient it writes in place.

The native body passes the prefix to the BLAS as a strided matrix, and the BLAS adds the gradient to the prefix of
main_grad in place, so another provider can save little.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import triton
from .main_grad import check_main_grad, gradient_buffer
from .registry import operator


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> None:
    torch._check(
        x.ndim > 0 and weight.ndim in (2, 4) and weight.shape[2:].numel() == 1,
        lambda: f"slim_linear: weight must be [O, I] or [O, I, 1, 1], got {list(weight.shape)}",
    )
    torch._check(
        0 < out_features <= weight.shape[0] and 0 < x.shape[-1] <= weight.shape[1],
        lambda: f"slim_linear: a weight of {list(weight.shape)} has no prefix of {out_features} x {x.shape[-1]}",
    )
    torch._check(
        bias is None or bias.shape == (out_features,),
        lambda: f"slim_linear: bias must be [{out_features}], got {None if bias is None else list(bias.shape)}",
    )


@operator(checks=(_check, functools.partial(check_main_grad, "slim_linear")))
def slim_linear(x: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor | None, out_features: int) -> Tensor:
    """Compute x @ weight[:out_features, :I].T + bias.

    Args:
        x: input, [..., I].
        weight: full weight, [O, I'] or, as of a pointwise convolution, [O, I', 1, 1], of which a prefix is used.
        bias: [out_features], or None.
        main_grad: buffer like weight to which the gradient of the prefix is added, or None to return a full-size
            gradient to autograd.
        out_features: number of output features.

    Returns:
        [..., out_features] in the dtype of x.

    Raises:
        RuntimeError: if shapes do not fit, or the weight has no such prefix.

    Example:
        >>> x, weight = torch.randn(2, 8), torch.randn(32, 16)
        >>> slim_linear(x, weight, None, None, 24).shape
        torch.Size([2, 24])
    """
    return F.linear(x, _prefix(weight, out_features, x.shape[-1]), bias)


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
    """The gradients of slim_linear.

    Returns:
        The gradients of x, of weight (full size, zero outside the prefix) and of bias. A gradient is an empty tensor if
        it is not requested; that of weight also with main_grad, to whose prefix it is added instead.
    """
    rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    of_x, of_weight, of_bias = x.new_empty(0), weight.new_empty(0), x.new_empty(0)
    if input_gradient:
        of_x = (rows @ _prefix(weight, rows.shape[1], inputs.shape[1])).view(x.shape)
    if weight_gradient:
        buffer, of_weight = gradient_buffer(weight, main_grad)
        _prefix(buffer, rows.shape[1], inputs.shape[1]).addmm_(rows.t(), inputs)
    if bias_gradient:
        of_bias = rows.sum(0)
    return of_x, of_weight, of_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.main_grad, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    of_x, of_weight, of_bias = slim_linear_backward(grad, x, weight, ctx.main_grad, *ctx.needs_input_grad[:3])
    return of_x, of_weight if ctx.main_grad is None else None, of_bias


slim_linear.register_autograd(_backward, _setup_context)


ONLY_BY_NAME = "the BLAS reads the prefix in place as well: choose it with DSPNET_KERNELS=triton"
triton.serve(slim_linear, accepts=("x", "weight"), without=("main_grad",), only_by_name=ONLY_BY_NAME)
triton.serve(slim_linear_backward, accepts=("x", "weight"), only_by_name=ONLY_BY_NAME)
