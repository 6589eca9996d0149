"""conv_moments, which dspnet_fast/ops specifies, by the kind of convolution.

Pointwise and depthwise convolutions have kernels that never write a normalised activation. A dense k x k convolution,
and a pointwise one with stride or padding, settles its input, uses the library's convolution, and takes the moments of
its output in one more pass.

Everything is deterministic: programs leave partial sums, which are added up in a fixed order.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from . import conv_moments_depthwise as depthwise
from . import conv_moments_pointwise as pointwise
from .launch import Input, OutputGradient, channels_last, contiguous, takes
from .moments import moments
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
    """As dspnet_fast.ops.conv_moments, without main_grad, for arguments that are valid and that `accepts` takes."""
    deferred = _input(x, scale, shift, act, gate)
    kernel = weight.shape[2]
    kind = _kind(kernel, stride, padding, groups)
    if kind == "dense":
        h = _settled(deferred)
        with _library():
            y = channels_last(torch.conv2d(h, weight[:out_channels, : h.shape[1]].to(h.dtype), None, stride, padding))
        if views:
            return y, *moments(y.permute(0, 2, 3, 1).reshape(-1, out_channels), views)
        nothing = x.new_empty(0, out_channels, dtype=torch.float32)
        return y, nothing, nothing.clone()
    size = [(length + 2 * padding - kernel) // stride + 1 for length in x.shape[2:]]
    y = torch.empty(len(x), out_channels, *size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if kind == "pointwise":
        return y, *pointwise.forward(deferred, weight, y, views)
    return y, *depthwise.forward(deferred, weight, y, stride, padding, views)


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
    wanted_input: bool,
    wanted_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As dspnet_fast.ops.conv_moments_backward, for arguments that are valid and that `accepts` takes."""
    deferred = _input(x, scale, shift, act, gate)
    grads = OutputGradient(
        channels_last(grad_y), grad_mean.contiguous(), grad_variance.contiguous(), channels_last(y), mean.contiguous()
    )
    kernel = weight.shape[2]
    kind = _kind(kernel, stride, padding, groups)
    of_x, of_weight = x.new_empty(0), weight.new_empty(0)
    of_scale, of_shift, of_gate = (x.new_empty(0, dtype=torch.float32) for _ in range(3))
    prefix = None
    if wanted_weight:
        prefix, of_weight = gradient_prefix(weight, main_grad, y.shape[1], x.shape[1] // groups)
    partial = None
    if kind == "dense":
        with _library():
            of_h, of_prefix, _ = torch.ops.aten.convolution_backward(
                output_gradient(grads),
                _settled(deferred) if wanted_weight else deferred.x,
                weight[: y.shape[1], : x.shape[1]].to(x.dtype),
                None,
                [stride, stride],
                [padding, padding],
                [1, 1],
                False,
                [0, 0],
                1,
                [wanted_input, wanted_weight, False],
            )
        if wanted_input:
            of_x = channels_last(of_h)
            if not deferred.materialized:
                of_x, _, partial = materialize_backward(
                    of_x, deferred.x, deferred.scale, deferred.shift, act, deferred.gate
                )
                to_gate = partial[2]
        if prefix is not None:
            prefix += of_prefix
    else:
        of_x = torch.empty_like(deferred.x) if wanted_input else of_x
        if kind == "depthwise":
            of_h = of_x if wanted_input else None
            partial, of_prefix = depthwise.backward(grads, deferred, weight, of_h, stride, padding, wanted_weight)
            to_gate = partial[2]
            if prefix is not None:
                prefix += of_prefix
        else:
            if wanted_input:
                partial, to_gate = pointwise.input_gradient(grads, deferred, weight, of_x)
            if prefix is not None:
                add_to_prefix(prefix, pointwise.weight_gradient(grads, deferred))
    if wanted_input and partial is not None and scale is not None:
        of_scale, of_shift = sums(partial[0], partial[1], len(scale))
    if gate is not None and wanted_input:
        of_gate = to_gate if len(to_gate) == len(x) else sums_per_image(to_gate, len(x))
    return of_x, of_scale, of_shift, of_gate, of_weight


def accepts(x: Tensor, weight: Tensor, groups: int) -> tuple[bool, str]:
    """Whether the kernels take these arguments. Returns (True, "") or (False, why not)."""
    if groups > 1 and weight.shape[-1] > depthwise.LARGEST_KERNEL:
        return False, f"it serves depthwise kernels up to {depthwise.LARGEST_KERNEL}, not {weight.shape[-1]}"
    return takes(x)


def _input(x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str, gate: Tensor | None) -> Input:
    """The arguments as kernels read them."""
    scale, shift, gate = contiguous(scale, shift, gate)
    return Input(channels_last(x), scale, shift, act, gate)


def _settled(deferred: Input) -> Tensor:
    """What a library's convolution can read: x itself if it is deferred nothing."""
    if deferred.materialized:
        return deferred.x
    return norm_act(deferred.x, deferred.scale, deferred.shift, deferred.act, deferred.gate, None, None, None)


@contextlib.contextmanager
def _library() -> Iterator[None]:
    """Convolutions of cuDNN as exact and as deterministic as our own kernels: torch allows tf32 in them unasked, and
    sums in any order."""
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


def _kind(kernel: int, stride: int, padding: int, groups: int) -> str:
    if groups > 1:
        return "depthwise"
    return "pointwise" if (kernel, stride, padding) == (1, 1, 0) else "dense"
