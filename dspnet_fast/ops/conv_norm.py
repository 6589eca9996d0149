"""conv_norm: a convolution, and the scale and shift of the batch normalisation of its output, by one call.

It computes what `conv_moments` and `scale_shift` compute one after another. On a GPU one launch merges the moments and
writes scale and shift. On a CPU one call of the compiled library takes 50 microseconds less of Python and autograd than
two, which is more than the work of both operators on small maps.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from . import cpp, triton
from .conv_moments import accepts as accepts_convolution
from .conv_moments import backward as convolution_backward
from .conv_moments import conv_moments, save_for_backward
from .deferred import upcast
from .registry import operator
from .scale_shift import accepts as accepts_vectors
from .scale_shift import backward as normalization_backward
from .scale_shift import scale_shift

SPLIT = len(conv_moments.parameters)  # the first arguments are those of conv_moments


def _check(*args: Any) -> None:
    conv_moments.check(*args[:SPLIT])
    x, views, out_channels = args[0], args[SPLIT - 1], args[7]
    mean = upcast(x[:0]).new_empty(views, out_channels, device="meta")
    scale_shift.check(mean, mean, *args[SPLIT:])


@operator(checks=(_check,), autocast=("x",), parts=("conv_moments", "scale_shift"))
def conv_norm(
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
    norm_weight: Tensor | None,
    norm_weight_main_grad: Tensor | None,
    norm_bias: Tensor | None,
    norm_bias_main_grad: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Convolution of a deferred activation, and the scale and shift of the batch normalisation of its output.

    The arguments up to `views` are those of `conv_moments`. The others are those of `scale_shift`, there without
    `norm_`.

    Returns:
        y [N, out_channels, H', W'], scale and shift of its normalisation [views, out_channels], and mean and variance
        of y [views, out_channels], which have no gradients.

    Raises:
        RuntimeError: if shapes or dtypes do not fit, or the output has no positions.

    Example:
        >>> x, weight, gamma = torch.randn(4, 8, 6, 6), torch.randn(32, 16, 3, 3), torch.ones(32)
        >>> convolution = x, None, None, "relu", None, weight, None, 24, 1, 1, 1, 2
        >>> y, scale, shift, _, _ = conv_norm(*convolution, gamma, None, None, None, 1e-5)
        >>> y.shape, scale.shape
        (torch.Size([4, 24, 6, 6]), torch.Size([2, 24]))
    """
    y, mean, variance = conv_moments(
        x, scale, shift, act, gate, weight, main_grad, out_channels, stride, padding, groups, views
    )
    next_scale, next_shift = scale_shift(
        mean, variance, norm_weight, norm_weight_main_grad, norm_bias, norm_bias_main_grad, eps
    )
    return y, next_scale, next_shift, mean, variance


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, _, _, mean, variance = output
    norm_weight, norm_weight_main_grad, norm_bias, norm_bias_main_grad, eps = inputs[SPLIT:]
    save_for_backward(ctx, inputs[:SPLIT], y, mean, variance, norm_weight, norm_bias)
    ctx.norm = norm_weight_main_grad, norm_bias_main_grad, eps
    ctx.mark_non_differentiable(mean, variance)
    ctx.set_materialize_grads(False)  # of mean and variance


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_scale: Tensor | None, grad_shift: Tensor | None, *rest: None
) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    y, mean = saved[5:7]
    grad_y = torch.zeros_like(y) if grad_y is None else grad_y
    grad_scale, grad_shift = (torch.zeros_like(mean) if grad is None else grad for grad in (grad_scale, grad_shift))
    grad_mean, grad_variance, *of_vectors = normalization_backward(ctx, saved[6:], grad_scale, grad_shift, SPLIT)
    of_convolution = convolution_backward(ctx, saved[:7], grad_y, grad_mean, grad_variance)
    return *of_convolution, *(SPLIT - len(of_convolution)) * [None], *of_vectors


conv_norm.register_autograd(_backward, _setup_context)


def _accepts(*args: Any) -> tuple[bool, str]:
    accepted = accepts_convolution(args[0], args[5])
    return accepts_vectors(*args[SPLIT:]) if accepted[0] else accepted


@conv_norm.provider(
    "cpp",
    devices=("cpu",),
    supported=functools.partial(cpp.has, "conv_norm_autograd"),
    accepts=_accepts,
    autograd=cpp.caller("conv_norm_autograd"),
)
def _in_two_calls(*args: Any) -> tuple[Tensor, ...]:
    y, mean, variance = conv_moments.providers["cpp"].run(*args[:SPLIT])
    return y, *scale_shift.providers["cpp"].run(mean, variance, *args[SPLIT:]), mean, variance


triton.serve(
    conv_norm,
    accepts=("x", "weight", "groups", *conv_norm.parameters[SPLIT:]),
    without=("main_grad", "norm_weight_main_grad", "norm_bias_main_grad"),
)
