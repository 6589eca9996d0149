"""slim_linear: a pointwise convolution of 1 x 1 images that are deferred nothing; its kernels read the prefix in
place."""

import torch
from torch import Tensor

from . import conv_moments_pointwise as pointwise
from .launch import Input, OutputGradient, takes
from .prefix import add_to_prefix, gradient_prefix


def slim_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """As dspnet_fast.ops.slim_linear, for arguments that are valid and that `accepts` takes."""
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
    """As dspnet_fast.ops.slim_linear_backward, for arguments that are valid and that `accepts` takes."""
    rows, grads = _images(x), _images(grad)
    nothing = x.new_empty(0, grads.shape[1], dtype=torch.float32)
    of_output, deferred = (
        OutputGradient(grads, nothing, nothing, grads, nothing),
        Input(rows, None, None, "identity", None),
    )
    of_x, of_weight, of_bias = x.new_empty(0), weight.new_empty(0), x.new_empty(0)
    if input_gradient:
        of_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        pointwise.input_gradient(of_output, deferred, weight, of_x)
    if weight_gradient:
        prefix, of_weight = gradient_prefix(weight, main_grad, grads.shape[1], rows.shape[1])
        add_to_prefix(prefix, pointwise.weight_gradient(of_output, deferred))
    if bias_gradient:
        of_bias = grads.sum((0, 2, 3))
    return of_x, of_weight, of_bias


def accepts(x: Tensor, weight: Tensor) -> tuple[bool, str]:
    """Whether the kernels take these arguments. Returns (True, "") or (False, why not)."""
    if x.dtype != weight.dtype:
        return False, f"it serves inputs and weights of one dtype, not {x.dtype} by {weight.dtype}"
    return takes(x)


def _images(x: Tensor) -> Tensor:
    """[..., C] as [rows, C, 1, 1]."""
    return x.reshape(-1, x.shape[-1]).contiguous()[:, :, None, None]
