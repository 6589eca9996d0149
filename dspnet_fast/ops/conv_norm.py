"""A convolution and the scale and shift of its batch normalisation by one call of the compiled library.

Both operators, conv_moments and scale_shift, need some 50 microseconds of Python and autograd per call. On small maps
that is more than their own work, and other threads wait meanwhile.
"""

from typing import Any

import torch
from torch import Tensor

from .conv_moments import conv_moments
from .registry import is_plain_eager, records


def conv_norm(
    convolution: tuple[Any, ...],
    weight: Tensor | None,
    weight_main_grad: Tensor | None,
    bias: Tensor | None,
    bias_main_grad: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """scale_shift of the moments of conv_moments, if one call can compute and record both.

    Args:
        convolution: the arguments of `conv_moments`.
        weight, weight_main_grad, bias, bias_main_grad, eps: as of `scale_shift`.

    Returns:
        y, scale, shift, and the mean and variance without gradients. None if the operators must be called instead:
        without gradients, under autocast, compilers and transforms, if one of the two operators has another provider,
        or if a vector is not float32.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
        return None
    if not records("scale_shift", "cpu"):
        return None
    vectors = weight, weight_main_grad, bias, bias_main_grad
    for vector in vectors:
        if vector is not None and vector.dtype != torch.float32:
            return None
    if not is_plain_eager((*convolution, *vectors)) or conv_moments.recorded(*convolution) is None:
        return None
    return torch.ops.dspnet_cpp.conv_norm_autograd.default(*convolution, *vectors, eps)
