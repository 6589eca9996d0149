"""slim_linear: calls the pointwise convolution's kernels, which read the weight's prefix in place, on 1 x 1 images."""

import torch
from torch import Tensor

from . import conv_moments_pointwise as pointwise
from . import conv_moments_pointwise_backward as pointwise_backward
from .launch import Input, OutputGradient, accepts_dtype
from .prefix import add_to_prefix, gradient_prefix


def slim_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """dspnet_fast.ops.slim_linear, for valid arguments that `accepts` supports."""
    rows = _images(x)
    y = torch.empty(len(rows), out_features, 1, 1, dtype=x.dtype, device=x.device)
    pointwise.forward(Input(rows, None, None, "identity", None), weight, y, 0)
    y = y.view(*x.shape[:-1], out_features)
    return y if bias is None else y.add_(bias)


def slim_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    main_grad: Tensor | None,
    input_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dspnet_fast.ops.slim_linear_backward, for valid arguments that `accepts` supports."""
    rows, grads = _images(x), _images(grad)
    no_moments = x.new_empty(0, grads.shape[1], dtype=torch.float32)
    output_gradient, deferred = (
        OutputGradient(grads, no_moments, no_moments, grads, no_moments),
        Input(rows, None, None, "identity", None),
    )
    grad_x, grad_weight, grad_bias = x.new_empty(0), weight.new_empty(0), x.new_empty(0)
    weight_sums = None
    if input_gradient:
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        *_, weight_sums = pointwise_backward.input_gradient(output_gradient, deferred, weight, grad_x, weight_gradient)
    if weight_gradient:
        prefix, grad_weight = gradient_prefix(weight, main_grad, grads.shape[1], rows.shape[1])
        if weight_sums is None:
            weight_sums = pointwise_backward.weight_gradient(output_gradient, deferred)
        add_to_prefix(prefix, weight_sums)
    if bias_gradient:
        grad_bias = grads.sum((0, 2, 3))
    return grad_x, grad_weight, grad_bias


def accepts(x: Tensor, weight: Tensor) -> tuple[bool, str]:
    """Whether the kernels support these arguments: (True, "") or (False, reason)."""
    if x.dtype != weight.dtype:
        return False, f"it supports inputs and weights of one dtype, not {x.dtype} and {weight.dtype}"
    return accepts_dtype(x)


def _images(x: Tensor) -> Tensor:
    """[..., C] as [rows, C, 1, 1]."""
    return x.reshape(-1, x.shape[-1]).contiguous()[:, :, None, None]
