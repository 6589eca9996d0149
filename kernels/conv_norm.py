"""conv_norm: the launches of conv_moments, of which the last, which merges the moments, writes scale and shift too."""

from typing import Any

from torch import Tensor

from . import conv_moments, scale_shift
from .launch import Input
from .moments import Norm, merge_moments


def conv_norm(
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
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """dspnet_fast.ops.conv_norm, without main_grads, for valid arguments that `accepts` supports."""
    deferred = Input.of(x, scale, shift, act, gate)
    y, partial = conv_moments.convolve(deferred, weight, out_channels, stride, padding, groups, views)
    return y, *merge_moments(partial, Norm(norm_weight, norm_bias, eps))


def accepts(x: Tensor, weight: Tensor, groups: int, *vectors: Any) -> tuple[bool, str]:
    """Whether the kernels support these arguments: (True, "") or (False, reason)."""
    accepted = conv_moments.accepts(x, weight, groups)
    return scale_shift.accepts(*vectors) if accepted[0] else accepted
