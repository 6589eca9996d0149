"""scale_shift: scale = weight r and shift = bias - mean scale, r = rsqrt(variance + eps), and their gradients.

With g = dscale - mean dshift: dmean = -dshift weight r, dvariance = -g weight r^3 / 2, dweight = sum(g r),
dbias = sum(dshift). A layer has a few thousand elements, so the number of launches dominates the cost: one for forward,
one for backward. A program processes its channels of all views, so sums over views need no second launch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import SIZES, launch

BLOCK_C = 256


@triton.jit
def load_affine(weight, bias, column, inside, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Weight and bias of these columns; 1 and 0 without them."""
    gamma = tl.load(weight + column, mask=inside, other=0.0) if HAS_WEIGHT else 1.0
    beta = tl.load(bias + column, mask=inside, other=0.0) if HAS_BIAS else 0.0
    return gamma, beta


@triton.jit
def store_scale_shift(scale, shift, offsets, inside, average, squared_deviation, gamma, beta, eps):
    """Stores scale and shift of a view's columns, from their mean and variance."""
    factor = gamma / tl.sqrt_rn(squared_deviation + eps)
    tl.store(scale + offsets, factor, mask=inside)
    tl.store(shift + offsets, beta - average * factor, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def scale_shift_kernel(
    mean,  # [views, C]
    variance,
    weight,  # at least [C]
    bias,
    scale,  # [views, C]
    shift,
    channels,
    views,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    gamma, beta = load_affine(weight, bias, column, inside, HAS_WEIGHT, HAS_BIAS)
    for view in range(views):
        offsets = view * channels + column
        average = tl.load(mean + offsets, mask=inside, other=0.0)
        squared_deviation = tl.load(variance + offsets, mask=inside, other=1.0)
        store_scale_shift(scale, shift, offsets, inside, average, squared_deviation, gamma, beta, eps)


@triton.jit(do_not_specialize=SIZES)
def scale_shift_backward_kernel(
    dscale,  # [views, C]
    dshift,
    mean,
    variance,
    weight,  # at least [C]
    dmean,  # [views, C]
    dvariance,
    dweight,  # added to
    dbias,
    channels,
    views,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    gamma = tl.load(weight + column, mask=inside, other=0.0) if HAS_WEIGHT else 1.0
    weight_sum = tl.zeros((BLOCK_C,), tl.float32)
    bias_sum = tl.zeros((BLOCK_C,), tl.float32)
    for view in range(views):
        offsets = view * channels + column
        rsqrt = 1 / tl.sqrt_rn(tl.load(variance + offsets, mask=inside, other=1.0) + eps)
        grad_shift_of_view = tl.load(dshift + offsets, mask=inside, other=0.0)
        grad = tl.load(dscale + offsets, mask=inside, other=0.0)
        grad -= tl.load(mean + offsets, mask=inside, other=0.0) * grad_shift_of_view
        tl.store(dmean + offsets, -grad_shift_of_view * gamma * rsqrt, mask=inside)
        tl.store(dvariance + offsets, -grad * gamma * rsqrt * rsqrt * rsqrt / 2, mask=inside)
        weight_sum += grad * rsqrt
        bias_sum += grad_shift_of_view
    if HAS_WEIGHT:
        tl.store(dweight + column, tl.load(dweight + column, mask=inside) + weight_sum, mask=inside)
    if HAS_BIAS:
        tl.store(dbias + column, tl.load(dbias + column, mask=inside) + bias_sum, mask=inside)


def scale_shift(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """dspnet_fast.ops.scale_shift, without the main_grads, which only the backward uses."""
    mean, variance = mean.contiguous(), variance.contiguous()
    scale, shift = torch.empty_like(mean), torch.empty_like(mean)
    views, channels = mean.shape
    launch(
        scale_shift_kernel,
        triton.cdiv(channels, BLOCK_C),
        mean,
        variance,
        mean if weight is None else weight,
        mean if bias is None else bias,
        scale,
        shift,
        channels,
        views,
        eps,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        BLOCK_C=BLOCK_C,
    )
    return scale, shift


def scale_shift_backward(
    grad_scale: Tensor,
    grad_shift: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    weight_main_grad: Tensor | None,
    bias: Tensor | None,
    bias_main_grad: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dspnet_fast.ops.scale_shift_backward."""
    views, channels = mean.shape
    grad_mean, grad_variance = (torch.empty(views, channels, device=mean.device) for _ in range(2))
    grad_weight, weight_buffer = _gradient_buffer(weight, weight_main_grad, mean)
    grad_bias, bias_buffer = _gradient_buffer(bias, bias_main_grad, mean)
    launch(
        scale_shift_backward_kernel,
        triton.cdiv(channels, BLOCK_C),
        grad_scale.contiguous(),
        grad_shift.contiguous(),
        mean.contiguous(),
        variance.contiguous(),
        mean if weight is None else weight,
        grad_mean,
        grad_variance,
        weight_buffer,
        bias_buffer,
        channels,
        views,
        eps,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        BLOCK_C=BLOCK_C,
    )
    return grad_mean, grad_variance, grad_weight, grad_bias


def _gradient_buffer(vector: Tensor | None, main_grad: Tensor | None, other: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient to return, empty with main_grad or without a vector, and the buffer that the kernel adds to."""
    if vector is None:
        return other.new_empty(0), other
    if main_grad is None:
        returned = torch.zeros(vector.shape, dtype=vector.dtype, device=vector.device)
        return returned, returned
    return other.new_empty(0), main_grad


def accepts(*args: Any) -> tuple[bool, str]:
    """Whether the kernels support these arguments of either operator: (True, "") or (False, reason)."""
    given = [arg for arg in args if isinstance(arg, Tensor)]
    if any(vector.dtype != torch.float32 for vector in given):
        return False, "it only supports float32"
    if any(not vector.is_contiguous() for vector in given if vector.ndim == 1):
        return False, "it only supports contiguous weights and biases"
    return True, ""
