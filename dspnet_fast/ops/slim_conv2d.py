"""slim_conv2d: a convolution with a prefix of a weight, which it reads and whose gradient it writes in place."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import cpp, triton
from .main_grad import check_main_grad, gradient_buffer
from .registry import operator


def _check(x: Tensor, weight: Tensor, main_grad: Tensor | None, out_channels: int, groups: int) -> None:
    torch._check(
        x.ndim == weight.ndim == 4,
        lambda: f"slim_conv2d: x and weight must have four dimensions, got {list(x.shape)} and {list(weight.shape)}",
    )
    torch._check(
        groups > 0 and 0 < out_channels <= weight.shape[0] and 0 < x.shape[1] // groups <= weight.shape[1],
        lambda: (
            f"slim_conv2d: a weight of {list(weight.shape)} has no prefix of {out_channels} x {x.shape[1]} channels in "
            f"{groups} groups"
        ),
    )
    check_main_grad("slim_conv2d", weight, main_grad)


@operator(checks=(_check,), autocast=("x", "bias"))
def slim_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    main_grad: Tensor | None,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Compute conv2d(x, weight[:out_channels, :C / groups], bias).

    Args:
        x: input, [N, C, H, W].
        weight: full weight, [O, I, kh, kw], of which a prefix is used, rounded to the dtype of x.
        bias: [out_channels], or None.
        main_grad: buffer like weight to which the gradient of the prefix is added, or None to return a full-size
            gradient to autograd.
        out_channels: number of output channels.
        stride: strides in height and width.
        padding: zero padding in height and width.
        dilation: dilations in height and width.
        groups: number of groups.

    Returns:
        [N, out_channels, H', W'] in the dtype of x.

    Raises:
        RuntimeError: if torch.nn.functional.conv2d rejects the shapes, or the weight has no such prefix.

    Example:
        >>> x, weight = torch.randn(2, 8, 6, 6), torch.randn(32, 16, 3, 3)
        >>> slim_conv2d(x, weight, None, None, 24, [1, 1], [1, 1], [1, 1], 1).shape
        torch.Size([2, 24, 6, 6])
    """
    prefix = _prefix(x, weight, out_channels, groups).to(x.dtype)
    return torch.conv2d(x, prefix, bias, stride, padding, dilation, groups)


def _prefix(x: Tensor, weight: Tensor, out_channels: int, groups: int) -> Tensor:
    return weight[:out_channels, : x.shape[1] // groups]


@operator(mutates=("main_grad",))
def slim_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    main_grad: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of slim_conv2d.

    Returns:
        The gradients of x, of weight (full size, zero outside the prefix) and of bias. A gradient is an empty tensor if
        it is not requested; that of weight also with main_grad, to whose prefix it is added instead.
    """
    prefix = _prefix(x, weight, grad.shape[1], groups)
    of_x, of_prefix, of_bias = torch.ops.aten.convolution_backward(
        grad,
        x,
        prefix.to(x.dtype),
        [grad.shape[1]],
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [input_gradient, weight_gradient, bias_gradient],
    )
    of_weight = weight.new_empty(0)
    if weight_gradient:
        buffer, of_weight = gradient_buffer(weight, main_grad)
        buffer[: prefix.shape[0], : prefix.shape[1]] += of_prefix
    return of_x if input_gradient else x.new_empty(0), of_weight, of_bias if bias_gradient else x.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.main_grad, _, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    of_x, of_weight, of_bias = slim_conv2d_backward(grad, x, weight, ctx.main_grad, *ctx.geometry, *needs)
    return of_x, of_weight if ctx.main_grad is None else None, of_bias


slim_conv2d.register_autograd(_backward, _setup_context)


def _accepts(
    supports: Callable[[Tensor, Tensor, int], tuple[bool, str]],
    x: Tensor,
    weight: Tensor,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[bool, str]:
    supported, reason = supports(x, weight, groups)
    if not supported:
        return False, reason
    if not (x.ndim == weight.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return False, "it only supports channels-last inputs"
    if x.dtype != weight.dtype:
        return False, f"it supports inputs and weights of one dtype, not {x.dtype} by {weight.dtype}"
    if groups != 1 and not groups == x.shape[1] == out_channels:
        return False, "it only supports dense and depthwise convolutions"
    if weight.shape[2] != weight.shape[3] or len({*stride}) > 1 or len({*padding}) > 1 or {*dilation} != {1}:
        return False, "it only supports square kernels, strides and paddings without dilation"
    return True, ""


def _forward(
    functions: Callable[[], Any],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    main_grad: Tensor | None,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """slim_conv2d by a provider's conv_moments, without normalisation and moments."""
    _check(x, weight, main_grad, out_channels, groups)
    torch._check(
        bias is None or (bias.shape == (out_channels,) and bias.dtype == x.dtype),
        lambda: f"slim_conv2d: bias must be [{out_channels}] of {x.dtype}",
    )
    prefix = _prefix(x, weight, out_channels, groups).float()
    y, _, _ = functions().conv_moments(
        x, None, None, "identity", None, prefix, out_channels, stride[0], padding[0], groups, 0
    )
    return y if bias is None else y.add_(bias[:, None, None])


def _backward_of_provider(
    functions: Callable[[], Any],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    main_grad: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    prefix = _prefix(x, weight, grad.shape[1], groups)
    buffer_prefix, of_prefix, of_weight = None, None, weight.new_empty(0)
    if weight_gradient:
        buffer, of_weight = gradient_buffer(weight, main_grad)
        of_prefix = _prefix(x, buffer, grad.shape[1], groups)
        if of_prefix.dtype != torch.float32:
            buffer_prefix, of_prefix = of_prefix, torch.zeros_like(prefix, dtype=torch.float32)
    no_moments = grad.new_empty(0, grad.shape[1], dtype=torch.float32)
    of_x, *_ = functions().conv_moments_backward(
        *(grad, no_moments, no_moments, x, None, None, "identity", None, prefix.float(), of_prefix, grad, no_moments),
        *(stride[0], padding[0], groups, input_gradient, weight_gradient, None, None, None, "identity"),
    )
    if buffer_prefix is not None and of_prefix is not None:
        buffer_prefix += of_prefix
    return of_x, of_weight, grad.sum((0, 2, 3)) if bias_gradient else x.new_empty(0)


def _serve(
    name: str, supports: Callable[[Tensor, Tensor, int], tuple[bool, str]], functions: Callable[[], Any], **options: Any
) -> None:
    """Register providers that call conv_moments and its backward of `functions()`."""
    accepts = functools.partial(_accepts, supports)
    slim_conv2d.provider(name, accepts=accepts, **options)(functools.partial(_forward, functions))
    slim_conv2d_backward.provider(
        name,
        accepts=lambda grad, x, weight, stride, padding, dilation, groups: accepts(
            x, weight, grad.shape[1], stride, padding, dilation, groups
        ),
        **options,
    )(functools.partial(_backward_of_provider, functions))


_serve(
    "cpp",
    lambda x, weight, groups: cpp.stores(x),
    lambda: torch.ops.dspnet_cpp,
    devices=("cpu",),
    supported=functools.partial(cpp.has, "conv_moments_backward"),
)
_serve(
    "triton",
    lambda *args: triton.kernels("conv_moments").accepts(*args),
    functools.partial(triton.kernels, "conv_moments"),
    devices=triton.DEVICES,
    supported=triton.supported,
    unproven=triton.UNPROVEN,
)
