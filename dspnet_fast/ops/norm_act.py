"""norm_act: materialise an activation with deferred normalisation, with the residual added at the end of a block."""

import functools
from typing import Any

import torch
from torch import Tensor

from . import cpp, triton
from .deferred import activation_gradient, apply_activation, check_deferred, normalization_gradients, normalized
from .registry import operator


def _check_residual(
    x: Tensor, act: str, residual: Tensor | None, residual_scale: Tensor | None, residual_shift: Tensor | None
) -> None:
    if residual is None:
        torch._check(
            residual_scale is None and residual_shift is None,
            lambda: "norm_act: residual_scale and residual_shift need a residual",
        )
        return
    torch._check(
        residual.shape == x.shape and residual.dtype == x.dtype,
        lambda: (
            f"norm_act: the residual must be {list(x.shape)} {x.dtype} as x, "
            f"got {list(residual.shape)} {residual.dtype}"
        ),
    )
    check_deferred("norm_act", residual, residual_scale, residual_shift, act)


@operator(checks=(functools.partial(check_deferred, "norm_act"), _check_residual))
def norm_act(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    gate: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_shift: Tensor | None,
) -> Tensor:
    """Compute act(scale * x + shift + r) * gate with r = residual_scale * residual + residual_shift.

    Args:
        x: raw output of a convolution, [N, C, H, W].
        scale: [V, C], a row per view or a single one, or None for no normalisation; fp32, or fp64 if x is.
        shift: like scale; None if scale is.
        act: activation function, one of `deferred.ACTS`.
        gate: factor per image and channel, [N, C], or None; dtype as of scale.
        residual: tensor of the shape and dtype of x, or None.
        residual_scale: as scale, for the residual; its number of rows may differ.
        residual_shift: as shift, for the residual.

    Returns:
        A new tensor of the shape and dtype of x, channels-last, computed in fp32, or fp64 if x is.

    Raises:
        RuntimeError: if shapes or dtypes do not fit.

    Example:
        >>> x, residual = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
        >>> y = norm_act(x, None, None, "relu", None, residual, None, None)
        >>> torch.equal(y, (x + residual).relu())
        True
    """
    value = apply_activation(_sum(x, scale, shift, residual, residual_scale, residual_shift), act)
    value = value if gate is None else value * gate[:, :, None, None]
    # Always a copy: an operator's output must not alias its input.
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(value)


def _sum(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_shift: Tensor | None,
) -> Tensor:
    z = normalized(x, scale, shift)
    return z if residual is None else z + normalized(residual, residual_scale, residual_shift)


@operator()
def norm_act_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    gate: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_shift: Tensor | None,
    residual_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of norm_act. With z the argument of the activation function,

        dz = d gate act'(z)        dx = scale dz, dscale = sum(dz x), dshift = sum(dz) over each view
        dgate = sum over positions of d act(z)        and for the residual as for x

    Returns:
        dx, dscale, dshift, dgate, dresidual, dresidual_scale, dresidual_shift; dx and dresidual are channels-last. A
        gradient is an empty tensor if its input is None; the last three also without residual_gradient.
    """
    z = _sum(x, scale, shift, residual, residual_scale, residual_shift)
    grad_z, grad_gate = grad.to(z.dtype), z.new_empty(0)
    if gate is not None:
        grad_gate = (grad_z * apply_activation(z, act)).sum((2, 3))
        grad_z = grad_z * gate[:, :, None, None]
    grad_z = grad_z * activation_gradient(z, act)
    gradients = []
    for tensor, rows in ((x, scale), (residual if residual_gradient else None, residual_scale)):
        if tensor is None:
            gradients += [x.new_empty(0), z.new_empty(0), z.new_empty(0)]
            continue
        of_tensor, *of_rows = normalization_gradients(grad_z, tensor, rows, 0 if rows is None else len(rows))
        gradients += [torch.empty_like(tensor, memory_format=torch.channels_last).copy_(of_tensor), *of_rows]
    return *gradients[:3], grad_gate, *gradients[3:]  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, shift, act, gate, *residual = inputs
    ctx.save_for_backward(x, scale, shift, gate, *residual)
    ctx.act = act


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, scale, shift, gate, residual, residual_scale, residual_shift = ctx.saved_tensors
    # If the residual is only added, its gradient is the output's gradient: skip the operator and the copy.
    passed_on = residual is not None and residual_scale is None and ctx.act == "identity" and gate is None
    wanted = residual is not None and not passed_on
    dx, dscale, dshift, dgate, dresidual, *dresidual_rows = norm_act_backward(
        grad, x, scale, shift, ctx.act, gate, residual, residual_scale, residual_shift, wanted
    )
    return dx, dscale, dshift, None, dgate, grad if passed_on else dresidual, *dresidual_rows


norm_act.register_autograd(_backward, _setup_context)


cpp.serve(norm_act, cpp.stores)
cpp.serve(norm_act_backward, cpp.stores)
triton.serve(norm_act, accepts=("x",))
triton.serve(norm_act_backward, accepts=("x",))
