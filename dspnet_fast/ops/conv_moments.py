"""conv_moments: a convolution that applies the deferred normalisation of its input while loading it, and returns the
moments of its output.

Between two convolutions a normalised activation is never written to memory (docs/formulation.md). Batch normalisation
becomes arithmetic on [V, C] moments outside the operator, which autograd differentiates.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import cpp, triton
from .deferred import (
    activation_gradient,
    apply_activation,
    check_deferred,
    materialize,
    normalization_gradients,
    normalized,
    per_image,
    upcast,
)
from .main_grad import check_main_grad
from .registry import operator
from .slim_conv2d import slim_conv2d_backward

NOT_POOLED = (None, None, None, "identity")


def _check(x: Tensor, weight: Tensor, out_channels: int, stride: int, padding: int, groups: int) -> None:
    channels, (height, width) = x.shape[1], x.shape[2:]
    torch._check(
        weight.ndim == 4 and weight.is_floating_point() and weight.shape[2] == weight.shape[3],
        lambda: f"conv_moments: weight must be [O, I, k, k], floating point, got {list(weight.shape)} {weight.dtype}",
    )
    out_full, in_full, kernel, _ = weight.shape
    torch._check(
        groups == 1 or 0 < groups == channels == out_channels,
        lambda: (
            f"conv_moments: {groups} groups for {channels} channels in and {out_channels} out: "
            "use 1, or as many as channels for a depthwise convolution"
        ),
    )
    torch._check(
        0 < out_channels <= out_full and 0 < channels // groups <= in_full and (groups == 1 or in_full == 1),
        lambda: (
            f"conv_moments: a weight of {list(weight.shape)} has no prefix of {out_channels} x {channels // groups}"
        ),
    )
    torch._check(
        stride > 0 and padding >= 0 and min(height, width) + 2 * padding >= kernel and x.numel() > 0,
        lambda: f"conv_moments: no output for {list(x.shape)} by kernel {kernel}, stride {stride}, padding {padding}",
    )


@operator(
    checks=(
        functools.partial(check_deferred, "conv_moments"),
        _check,
        functools.partial(check_main_grad, "conv_moments"),
    ),
    autocast=("x",),
)
def conv_moments(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    gate: Tensor | None,
    weight: Tensor,
    main_grad: Tensor | None,
    out_channels: int,
    stride: int,
    padding: int,
    groups: int,
    views: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution of a deferred activation, and the moments of its output.

    y = conv(h, weight[:out_channels, :C / groups]) with h = act(scale * x + shift) * gate.

    Args:
        x: raw output of the previous convolution, [N, C, H, W], floating point.
        scale: [V, C], V = 1 or one row per view, or None for no normalisation; fp32, or fp64 if x is.
        shift: like scale; None if scale is.
        act: activation function, one of `deferred.ACTS`.
        gate: factor per image and channel, [N, C], or None; dtype as of scale.
        weight: full weight, [O, I, k, k], of which a prefix is used; its dtype may be wider than that of x.
        main_grad: buffer like weight to which the gradient of the prefix is added, or None to return a full-size
            gradient to autograd.
        out_channels: number of output channels; C for a depthwise convolution.
        stride: stride in both dimensions.
        padding: zero padding on all sides.
        groups: 1, or C for a depthwise convolution.
        views: number of equal, consecutive parts of the batch to compute moments of; 0 for none.

    Returns:
        y [N, out_channels, H', W'], channels-last, in the dtype of x, and the mean and biased variance of y over each
        view's images and positions, [views, out_channels] in fp32, or fp64 if x is. If x is narrower than fp32, h and
        the weight are rounded to its dtype and sums are in fp32.

    Raises:
        RuntimeError: if shapes or dtypes do not fit, or the output has no positions.

    Example:
        >>> x, weight = torch.randn(4, 8, 6, 6), torch.randn(32, 16, 3, 3)
        >>> y, mean, variance = conv_moments(x, None, None, "relu", None, weight, None, 24, 1, 1, 1, 2)
        >>> y.shape, mean.shape
        (torch.Size([4, 24, 6, 6]), torch.Size([2, 24]))
    """
    h = materialize(x, scale, shift, act, gate).to(x.dtype)
    prefix = weight[:out_channels, : x.shape[1] // groups].to(x.dtype)
    y = torch.conv2d(h, prefix, None, stride, padding, 1, groups).contiguous(memory_format=torch.channels_last)
    if not views:
        return y, upcast(y).new_empty(0, out_channels), upcast(y).new_empty(0, out_channels)
    variance, mean = torch.var_mean(upcast(y).unflatten(0, (views, -1)), (1, 3, 4), correction=0)
    return y, mean, variance


def _check_pooled(
    y: Tensor,
    pooled_grad: Tensor | None,
    pooled_scale: Tensor | None,
    pooled_shift: Tensor | None,
    pooled_act: str,
    groups: int,
) -> None:
    check_deferred("conv_moments_backward", y, pooled_scale, pooled_shift, pooled_act, pooled_grad)
    torch._check(
        pooled_grad is None or groups > 1,
        lambda: "conv_moments_backward: only depthwise convolutions support pooled_grad",
    )


@operator(mutates=("main_grad",), checks=(_check_pooled,))
def conv_moments_backward(
    grad_y: Tensor,
    grad_mean: Tensor,
    grad_variance: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    gate: Tensor | None,
    weight: Tensor,
    main_grad: Tensor | None,
    y: Tensor,
    mean: Tensor,
    stride: int,
    padding: int,
    groups: int,
    input_gradient: bool,
    weight_gradient: bool,
    pooled_grad: Tensor | None,
    pooled_scale: Tensor | None,
    pooled_shift: Tensor | None,
    pooled_act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of conv_moments. With cnt elements per channel and view,

        e = dy + dmean / cnt + 2 (y - mean) dvariance / cnt
        dW = conv_weight_gradient(h, e), with h recomputed from x        dh = conv_transpose(e, W)
        dz = dh gate act'(z), z = scale x + shift        dx = scale dz
        dscale = sum(dz x), dshift = sum(dz), over each view        dgate = sum over positions of dh act(z)

    pooled_grad [N, O] is the gradient of norm_act_pool(y, pooled_scale, pooled_shift, pooled_act), or None. It is only
    supported for depthwise convolutions. With it, dy is without the part that passes through this mean, which is

        pooled_grad / (H' W') pooled_scale act'(pooled_scale y + pooled_shift)

    and is added to e.

    Returns:
        dx like x (channels-last), dscale and dshift [V, C], dgate [N, C], and dW like the full weight, zero outside the
        prefix. A gradient is an empty tensor if its input is None, for all but dW without input_gradient, for dW
        without weight_gradient, and for dW with main_grad, to whose prefix it is added instead.
    """
    upcast_y = upcast(y)
    views = len(mean)
    e = upcast(grad_y)
    if views:
        count = y.numel() // (y.shape[1] * views)
        e = e + per_image(grad_mean / count, len(y))
        e = e + (upcast_y - per_image(mean, len(y))) * per_image(2 * grad_variance / count, len(y))
    if pooled_grad is not None:
        pooled = activation_gradient(normalized(y, pooled_scale, pooled_shift), pooled_act)
        pooled = pooled * (pooled_grad / (y.shape[2] * y.shape[3]))[:, :, None, None]
        e = e + (pooled if pooled_scale is None else pooled * per_image(pooled_scale, len(y)))
    e = e.to(x.dtype)
    z = normalized(x, scale, shift)
    value = apply_activation(z, act)
    h = (value if gate is None else value * gate[:, :, None, None]).to(x.dtype)
    geometry = [stride, stride], [padding, padding], [1, 1], groups
    grad_h, grad_weight, _ = slim_conv2d_backward.native(
        e, h, weight, main_grad, *geometry, input_gradient, weight_gradient, False
    )
    grad_x, (grad_scale, grad_shift, grad_gate) = x.new_empty(0), (upcast_y.new_empty(0) for _ in range(3))
    if input_gradient:
        grad_h = upcast(grad_h)
        if gate is not None:
            grad_gate = (grad_h * value).sum((2, 3))
            grad_h = grad_h * gate[:, :, None, None]
        rows = 0 if scale is None else len(scale)
        grad_x, grad_scale, grad_shift = normalization_gradients(grad_h * activation_gradient(z, act), x, scale, rows)
        grad_x = grad_x.contiguous(memory_format=torch.channels_last)
    return grad_x, grad_scale, grad_shift, grad_gate, grad_weight


@dataclass
class PooledGradient:
    """Passes the gradient of a pooled output to the backward of the convolution that computed the output.

    Autograd calls this backward after those of all operators that read the output.

    Attributes:
        claimed: whether a pooling passes its gradient in this way; one at most can.
        arguments: the last four arguments of conv_moments_backward.
        graph_task: the call of backward() that computed them.
    """

    claimed: bool = False
    arguments: tuple[Tensor | None, Tensor | None, Tensor | None, str] = NOT_POOLED
    graph_task: int = -1

    def put(self, *arguments: Any) -> None:
        """Pass on the gradient; valid for the current call of backward() alone."""
        self.arguments, self.graph_task = arguments, torch._C._current_graph_task_id()

    def take(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, str]:
        """The arguments for the current call of backward()."""
        arguments, self.arguments = self.arguments, NOT_POOLED
        return arguments if self.graph_task == torch._C._current_graph_task_id() else NOT_POOLED


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], y: Tensor, mean: Tensor, *more: Tensor | None) -> None:
    """Save in ctx what `backward` needs, and further tensors after it."""
    x, scale, shift, act, gate, weight, main_grad, _, stride, padding, groups, _ = inputs
    ctx.save_for_backward(x, scale, shift, gate, weight, y, mean, *more)
    ctx.main_grad = main_grad  # not saved for backward: autograd rejects a saved tensor that was changed in place
    ctx.act, ctx.geometry = act, (stride, padding, groups)
    ctx.pooled_gradient = PooledGradient(claimed=groups == 1)  # only depthwise convolutions support it


def backward(ctx: Any, saved: Sequence[Any], *grads: Any) -> tuple[Any, ...]:
    """The gradients of conv_moments' arguments up to weight, from those of y, mean and variance.

    saved: the tensors that `save_for_backward` saved. Autograd is asked for them once: a checkpoint refuses a second
        time.
    """
    x, scale, shift, gate, weight, y, mean = saved
    *of_input, of_weight = ctx.needs_input_grad[:6]
    wanted = any(of_input), of_weight
    grad_x, grad_scale, grad_shift, grad_gate, grad_weight = conv_moments_backward(
        *(*grads, x, scale, shift, ctx.act, gate, weight, ctx.main_grad, y, mean, *ctx.geometry, *wanted),
        *ctx.pooled_gradient.take(),
    )
    return grad_x, grad_scale, grad_shift, None, grad_gate, grad_weight if ctx.main_grad is None else None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    y, mean, _ = output
    save_for_backward(ctx, inputs, y, mean)


def _backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    return backward(ctx, ctx.saved_tensors, *grads)


conv_moments.register_autograd(_backward, _setup_context)


def accepts(x: Tensor, weight: Tensor) -> tuple[bool, str]:
    """Whether the compiled library supports these arguments: (True, "") or (False, reason)."""
    if x.dtype not in (torch.float32, torch.bfloat16) or weight.dtype != torch.float32:
        return False, f"it supports float32 and bfloat16 inputs with float32 weights, not {x.dtype} with {weight.dtype}"
    return True, ""


cpp.serve(conv_moments, accepts, without=("main_grad",), autograd=True)
cpp.serve(conv_moments_backward, accepts)
triton.serve(conv_moments, accepts=("x", "weight", "groups"), without=("main_grad",))
triton.serve(conv_moments_backward, accepts=("x", "weight", "groups"))
