"""norm_act_pool: global average pooling of an activation with deferred normalisation, for squeeze-and-excite and the
last layer.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from . import cpp, triton
from .deferred import activation_gradient, check_deferred, materialize, normalization_gradients, normalized
from .registry import operator


def _check_positions(x: Tensor) -> None:
    torch._check(x.shape[2] * x.shape[3] > 0, lambda: f"norm_act_pool: no positions in {list(x.shape)}")


@operator(checks=(functools.partial(check_deferred, "norm_act_pool"), _check_positions))
def norm_act_pool(x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str) -> Tensor:
    """Compute the mean over H and W of act(scale * x + shift).

    Args:
        x: raw output of a convolution, [N, C, H, W].
        scale: [V, C], a row per view or a single one, or None for no normalisation; fp32, or fp64 if x is.
        shift: like scale; None if scale is.
        act: activation function, one of `deferred.ACTS`.

    Returns:
        [N, C] in fp32, or fp64 if x is.

    Raises:
        RuntimeError: if shapes or dtypes do not fit, or x has no positions.

    Example:
        >>> x = torch.randn(2, 8, 4, 4)
        >>> y = norm_act_pool(x, None, None, "relu")
        >>> torch.allclose(y, x.relu().mean((2, 3)))
        True
    """
    return materialize(x, scale, shift, act, None).mean((2, 3))


@operator()
def norm_act_pool_backward(
    grad: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of norm_act_pool: dz = d act'(z) / (H W), and dx = scale dz, dscale = sum(dz x), dshift = sum(dz).

    Returns:
        dx (channels-last), dscale and dshift; the last two empty without scale and shift.
    """
    z = normalized(x, scale, shift)
    grad_z = (grad / (x.shape[2] * x.shape[3]))[:, :, None, None] * activation_gradient(z, act)
    grad_x, *rest = normalization_gradients(grad_z, x, scale, 0 if scale is None else len(scale))
    return grad_x.contiguous(memory_format=torch.channels_last), *rest  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, shift, ctx.act = inputs
    ctx.save_for_backward(x, scale, shift)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, scale, shift = ctx.saved_tensors
    return norm_act_pool_backward(grad, x, scale, shift, ctx.act)


norm_act_pool.register_autograd(_backward, _setup_context)


cpp.serve(norm_act_pool, cpp.stores)
cpp.serve(norm_act_pool_backward, cpp.stores)
triton.serve(norm_act_pool, accepts=("x",))
triton.serve(norm_act_pool_backward, accepts=("x",))
