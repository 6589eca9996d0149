"""conv_moments: selects the algorithm for a convolution.

Pointwise and depthwise convolutions have kernels that apply the deferred normalisation while loading. Dense ones,
k x k or with a stride or padding, write the normalised input, call cuDNN, and read its output again for the moments.

Results are deterministic: programs write partial sums, which are added up in a fixed order.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from . import conv_moments_depthwise as depthwise
from . import conv_moments_pointwise as pointwise
from . import conv_moments_pointwise_backward as pointwise_backward
from .launch import Input, OutputGradient, accepts_dtype, channels_last
from .moments import PartialMoments, merge_moments, moments_of_rows
from .norm_act import materialize_backward, norm_act
from .output_gradient import output_gradient
from .prefix import add_to_prefix, gradient_prefix
from .sums import sums, sums_per_image


def conv_moments(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    gate: Tensor | None,
    weight: Tensor,
    out_channels: int,
    stride: int,
    padding: int,
    groups: int,
    views: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dspnet_fast.ops.conv_moments, without main_grad, for valid arguments that `accepts` supports."""
    deferred = Input.of(x, scale, shift, act, gate)
    y, partial = convolve(deferred, weight, out_channels, stride, padding, groups, views)
    mean, variance = merge_moments(partial)
    return y, mean, variance


def convolve(
    deferred: Input, weight: Tensor, out_channels: int, stride: int, padding: int, groups: int, views: int
) -> tuple[Tensor, PartialMoments]:
    """The convolution y, and its moments, which are still to be merged."""
    x, kernel = deferred.x, weight.shape[2]
    algorithm = _algorithm(kernel, stride, padding, groups)
    if algorithm == "dense":
        h = _materialize(deferred)
        with _exact_cudnn():
            y = channels_last(torch.conv2d(h, weight[:out_channels, : h.shape[1]].to(h.dtype), None, stride, padding))
        rows = y.permute(0, 2, 3, 1).reshape(-1, out_channels)
        return y, moments_of_rows(rows, views) if views else PartialMoments.none(y)
    size = [(length + 2 * padding - kernel) // stride + 1 for length in x.shape[2:]]
    y = torch.empty(len(x), out_channels, *size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if algorithm == "pointwise":
        return y, pointwise.forward(deferred, weight, y, views)
    return y, depthwise.forward(deferred, weight, y, stride, padding, views)


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
    """dspnet_fast.ops.conv_moments_backward, for valid arguments that `accepts` supports."""
    deferred = Input.of(x, scale, shift, act, gate)
    grads = OutputGradient(
        channels_last(grad_y), grad_mean.contiguous(), grad_variance.contiguous(), channels_last(y), mean.contiguous()
    )
    kernel = weight.shape[2]
    algorithm = _algorithm(kernel, stride, padding, groups)
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    grad_scale, grad_shift, grad_gate = (x.new_empty(0, dtype=torch.float32) for _ in range(3))
    prefix = None
    if weight_gradient:
        prefix, grad_weight = gradient_prefix(weight, main_grad, y.shape[1], x.shape[1] // groups)
    partial = weight_sums = None
    if algorithm == "dense":
        with _exact_cudnn():
            grad_h, grad_prefix, _ = torch.ops.aten.convolution_backward(
                output_gradient(grads),
                _materialize(deferred) if weight_gradient else deferred.x,
                weight[: y.shape[1], : x.shape[1]].to(x.dtype),
                None,
                [stride, stride],
                [padding, padding],
                [1, 1],
                False,
                [0, 0],
                1,
                [input_gradient, weight_gradient, False],
            )
        if input_gradient:
            grad_x = channels_last(grad_h)
            if not deferred.materialized:
                grad_x, _, partial = materialize_backward(grad_x, deferred)
                gate_sums = partial[2]
        if prefix is not None:
            prefix += grad_prefix
    else:
        grad_x = torch.empty_like(deferred.x) if input_gradient else grad_x
        if algorithm == "depthwise":
            grad_h = grad_x if input_gradient else None
            pooled = Input.of(y, pooled_scale, pooled_shift, pooled_act, pooled_grad)
            partial, dtaps = depthwise.backward(
                grads, deferred, pooled, weight, grad_h, stride, padding, weight_gradient
            )
            gate_sums = partial[2]
            if prefix is not None:
                prefix, weight_sums = prefix.view(x.shape[1], -1).t(), dtaps
        else:
            if input_gradient:
                partial, gate_sums, weight_sums = pointwise_backward.input_gradient(
                    grads, deferred, weight, grad_x, weight_gradient
                )
            if prefix is not None and weight_sums is None:
                weight_sums = pointwise_backward.weight_gradient(grads, deferred)
    if input_gradient and partial is not None and scale is not None:
        grad_scale, grad_shift = sums(partial[0], partial[1], len(scale), prefix, weight_sums)
    elif prefix is not None and weight_sums is not None:
        add_to_prefix(prefix, weight_sums)
    if gate is not None and input_gradient:
        grad_gate = gate_sums if len(gate_sums) == len(x) else sums_per_image(gate_sums, len(x))
    return grad_x, grad_scale, grad_shift, grad_gate, grad_weight


def accepts(x: Tensor, weight: Tensor, groups: int) -> tuple[bool, str]:
    """Whether the kernels support these arguments: (True, "") or (False, reason)."""
    if groups > 1 and weight.shape[-1] > depthwise.LARGEST_KERNEL:
        return False, f"it supports depthwise kernels up to {depthwise.LARGEST_KERNEL}, not {weight.shape[-1]}"
    return accepts_dtype(x)


def _materialize(deferred: Input) -> Tensor:
    """h = act(scale x + shift) * gate; x itself without deferred normalisation."""
    if deferred.materialized:
        return deferred.x
    return norm_act(deferred.x, deferred.scale, deferred.shift, deferred.act, deferred.gate, None, None, None)


@contextlib.contextmanager
def _exact_cudnn() -> Iterator[None]:
    """Set cuDNN's convolutions to deterministic algorithms and to the precision of the other kernels.

    By default torch allows tf32 and nondeterministic sums in them.
    """
    cudnn, precision = torch.backends.cudnn, pointwise.precision()
    before = cudnn.conv.fp32_precision, cudnn.deterministic
    if (before[0] == "tf32") == (precision == "tf32") and before[1]:
        yield
        return
    cudnn.conv.fp32_precision, cudnn.deterministic = precision, True
    try:
        yield
    finally:
        cudnn.conv.fp32_precision, cudnn.deterministic = before


def _algorithm(kernel: int, stride: int, padding: int, groups: int) -> str:
    if groups > 1:
        return "depthwise"
    return "pointwise" if (kernel, stride, padding) == (1, 1, 0) else "dense"
