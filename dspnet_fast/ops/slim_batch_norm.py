"""slim_batch_norm: batch normalisation of each view separately, with moments as outputs; for the drop-in layers."""

from typing import Any

import torch
from torch import Tensor

from . import cpp, triton
from .deferred import upcast
from .registry import operator
from .scale_shift import scale_shift


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, views: int) -> None:
    torch._check(
        x.ndim >= 2 and x.is_floating_point() and x.numel() > 0 and views > 0 and len(x) % views == 0,
        lambda: (
            f"slim_batch_norm: x must be [N, C, ...], floating point, with N a multiple of {views} views, "
            f"got {list(x.shape)} {x.dtype}"
        ),
    )
    for name, vector in (("weight", weight), ("bias", bias)):
        torch._check(
            vector is None or vector.shape == x.shape[1:2],
            lambda name=name: f"slim_batch_norm: {name} must be [{x.shape[1]}]",  # type: ignore[misc]
        )


@operator(checks=(_check,))
def slim_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, views: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each view by its own moments: y = (x - mean) / sqrt(variance + eps) * weight + bias.

    Args:
        x: [N, C, ...], floating point and not empty; N is a multiple of `views`.
        weight: gamma, [C], or None for 1.
        bias: beta, [C], or None for 0.
        eps: added to the variance.
        views: number of equal, consecutive parts of the batch.

    Returns:
        y like x, and the mean and biased variance [views, C] in fp32, or fp64 if x is. Differentiable in all three.

    Raises:
        RuntimeError: if shapes or dtypes do not fit.

    Example:
        >>> x = torch.randn(8, 3, 5, 5)
        >>> y, mean, variance = slim_batch_norm(x, None, None, 1e-5, 2)
        >>> y.shape, mean.shape
        (torch.Size([8, 3, 5, 5]), torch.Size([2, 3]))
    """
    rows = upcast(x).unflatten(0, (views, -1))
    variance, mean = torch.var_mean(rows, _reduced(rows), correction=0)
    scale, shift = scale_shift.native(mean, variance, weight, None, bias, None, eps)
    y = torch.empty_like(x).copy_((rows * _broadcast(scale, rows) + _broadcast(shift, rows)).flatten(0, 1))
    return y, mean, variance


def _reduced(rows: Tensor) -> tuple[int, ...]:
    """The dimensions of [views, N, C, ...] to reduce for moments."""
    return 1, *range(3, rows.ndim)


def _broadcast(vectors: Tensor, rows: Tensor) -> Tensor:
    """[views, C] -> [views, 1, C, 1, ...]."""
    return vectors.view(len(vectors), 1, -1, *(rows.ndim - 3) * [1])


@operator()
def slim_batch_norm_backward(
    grad_y: Tensor,
    grad_mean: Tensor,
    grad_variance: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of slim_batch_norm. With r = rsqrt(variance + eps) and cnt elements per channel and view,

        dbias = sum(dy)        dweight = r sum(dy (x - mean))
        dx = weight r dy + (dmean - weight r dbias) / cnt + 2 (x - mean) (dvariance - weight r^2 dweight / 2) / cnt

    with sums over each view; the returned dweight and dbias are summed over all views.

    Returns:
        dx like x, dweight and dbias [C].
    """
    rows = upcast(x).unflatten(0, (len(mean), -1))
    grads = upcast(grad_y).unflatten(0, (len(mean), -1))
    count = rows.numel() // mean.numel()
    centred = rows - _broadcast(mean, rows)
    rsqrt = (variance + eps).rsqrt()
    scale = rsqrt if weight is None else rsqrt * weight
    of_bias = grads.sum(_reduced(rows))
    of_weight = rsqrt * (grads * centred).sum(_reduced(rows))
    to_mean = (grad_mean - scale * of_bias) / count
    to_variance = 2 * (grad_variance - scale * rsqrt * of_weight / 2) / count
    of_x = grads * _broadcast(scale, rows) + _broadcast(to_mean, rows) + centred * _broadcast(to_variance, rows)
    return torch.empty_like(x).copy_(of_x.flatten(0, 1)), of_weight.sum(0), of_bias.sum(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _backward(ctx: Any, grad_y: Tensor, grad_mean: Tensor, grad_variance: Tensor) -> tuple[Any, ...]:
    x, weight, bias, mean, variance = ctx.saved_tensors
    of_x, of_weight, of_bias = slim_batch_norm_backward(
        grad_y, grad_mean, grad_variance, x, weight, mean, variance, ctx.eps
    )
    return (
        of_x,
        None if weight is None else of_weight.to(weight.dtype),
        None if bias is None else of_bias.to(bias.dtype),
    )


slim_batch_norm.register_autograd(_backward, _setup_context)


def _accepts(x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> tuple[bool, str]:
    dense = x.is_contiguous() if x.ndim == 2 else x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if not dense:
        return False, "it only supports [N, C], contiguous, and [N, C, H, W], channels-last"
    if any(vector is not None and vector.dtype != torch.float32 for vector in (weight, bias)):
        return False, "it only supports weights and biases in float32"
    return cpp.stores(x)


cpp.serve(slim_batch_norm, _accepts)
cpp.serve(slim_batch_norm_backward, _accepts)
triton.serve(slim_batch_norm, accepts=("x",))
triton.serve(slim_batch_norm_backward, accepts=("x",))
