"""scale_shift: batch normalisation as a scale and a shift per channel, computed from moments by one operator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cpp, triton
from .main_grad import alike, gradient_buffer
from .registry import operator


def _check(mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    torch._check(
        mean.ndim == 2 and mean.is_floating_point() and mean.shape == variance.shape and mean.dtype == variance.dtype,
        lambda: (
            "scale_shift: mean and variance must be [V, C] of one dtype, "
            f"got {list(mean.shape)} {mean.dtype} and {list(variance.shape)} {variance.dtype}"
        ),
    )
    for name, vector in (("weight", weight), ("bias", bias)):
        torch._check(
            vector is None or (vector.ndim == 1 and vector.is_floating_point() and len(vector) >= mean.shape[1]),
            lambda name=name: f"scale_shift: {name} must be a vector of {mean.shape[1]} or more",  # type: ignore[misc]
        )


def _check_main_grads(
    weight: Tensor | None, weight_main_grad: Tensor | None, bias: Tensor | None, bias_main_grad: Tensor | None
) -> None:
    for name, vector, main_grad in (("weight", weight, weight_main_grad), ("bias", bias, bias_main_grad)):
        if not alike(main_grad, vector):
            raise RuntimeError(f"scale_shift: {name}_main_grad must have the shape and dtype of {name}")


@operator(checks=(_check, _check_main_grads))
def scale_shift(
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    weight_main_grad: Tensor | None,
    bias: Tensor | None,
    bias_main_grad: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute scale and shift such that x * scale + shift is the batch normalisation of x.

    scale = weight[:C] / sqrt(variance + eps) and shift = bias[:C] - mean * scale.

    Args:
        mean: mean of each of V views, [V, C], floating point.
        variance: biased variance, of the same shape and dtype.
        weight: gamma, a vector of at least C elements, or None for 1.
        weight_main_grad: buffer like weight to which the gradient of the prefix is added, or None to return a full-size
            gradient to autograd.
        bias: beta, a vector of at least C elements, or None for 0.
        bias_main_grad: as weight_main_grad, for the bias.
        eps: added to the variance.

    Returns:
        scale and shift, [V, C] in the dtype of mean.

    Raises:
        RuntimeError: if shapes or dtypes do not fit.

    Example:
        >>> mean, variance = torch.ones(1, 3), torch.full((1, 3), 4.0)
        >>> scale_shift(mean, variance, None, None, None, None, 0.0)
        (tensor([[0.5000, 0.5000, 0.5000]]), tensor([[-0.5000, -0.5000, -0.5000]]))
    """
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * _prefix(weight, mean)
    return scale, -mean * scale if bias is None else _prefix(bias, mean) - mean * scale


def _prefix(vector: Tensor, mean: Tensor) -> Tensor:
    return vector[: mean.shape[1]].to(mean.dtype)


@operator(mutates=("weight_main_grad", "bias_main_grad"))
def scale_shift_backward(
    grad_scale: Tensor,
    grad_shift: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    weight_main_grad: Tensor | None,
    bias: Tensor | None,
    bias_main_grad: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of scale_shift. With r = rsqrt(variance + eps) and g = dscale - mean dshift,

        dmean = -dshift weight r        dvariance = -g weight r^3 / 2
        dweight = sum over views of g r        dbias = sum over views of dshift

    Returns:
        dmean and dvariance [V, C], and dweight and dbias like the full vectors, zero outside the prefix. dweight or
        dbias is an empty tensor if its vector is None or has a main_grad, to whose prefix the gradient is added
        instead.
    """
    rsqrt = (variance + eps).rsqrt()
    scale = rsqrt if weight is None else rsqrt * _prefix(weight, mean)
    grad = grad_scale - mean * grad_shift

    def of_vector(vector: Tensor | None, main_grad: Tensor | None, of_prefix: Tensor) -> Tensor:
        if vector is None:
            return mean.new_empty(0)
        buffer, returned = gradient_buffer(vector, main_grad)
        buffer[: mean.shape[1]] += of_prefix.sum(0)
        return returned

    of_weight = of_vector(weight, weight_main_grad, grad * rsqrt)
    of_bias = of_vector(bias, bias_main_grad, grad_shift)
    return -grad_shift * scale, -grad * scale * rsqrt.square() / 2, of_weight, of_bias


def backward(
    ctx: Any, saved: Sequence[Any], grad_scale: Tensor, grad_shift: Tensor, first_vector: int = 2
) -> tuple[Any, ...]:
    """The gradients of scale_shift's arguments up to bias, from those of scale and shift.

    ctx: ctx.norm has both main_grads and eps.
    saved: mean, variance, weight and bias.
    first_vector: the position of weight among the arguments that ctx.needs_input_grad describes.
    """
    mean, variance, weight, bias = saved
    *main_grads, eps = ctx.norm
    # A frozen vector's main_grad must not change.
    weight_main_grad, bias_main_grad = (
        main_grad if wanted else None
        for main_grad, wanted in zip(main_grads, ctx.needs_input_grad[first_vector : first_vector + 3 : 2], strict=True)
    )
    grad_mean, grad_variance, grad_weight, grad_bias = scale_shift_backward(
        grad_scale, grad_shift, mean, variance, weight, weight_main_grad, bias, bias_main_grad, eps
    )
    return (
        grad_mean,
        grad_variance,
        grad_weight if weight_main_grad is None else None,
        None,
        grad_bias if bias_main_grad is None else None,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    mean, variance, weight, weight_main_grad, bias, bias_main_grad, eps = inputs
    ctx.save_for_backward(mean, variance, weight, bias)
    ctx.norm = weight_main_grad, bias_main_grad, eps  # not saved for backward: autograd rejects changed tensors


def _backward(ctx: Any, grad_scale: Tensor, grad_shift: Tensor) -> tuple[Any, ...]:
    return backward(ctx, ctx.saved_tensors, grad_scale, grad_shift)


scale_shift.register_autograd(_backward, _setup_context)


def accepts(*args: Any) -> tuple[bool, str]:
    """Whether the compiled library supports these arguments: (True, "") or (False, reason)."""
    if any(isinstance(arg, Tensor) and arg.dtype != torch.float32 for arg in args):
        return False, "it only supports float32"
    return True, ""


cpp.serve(scale_shift, accepts, without=("weight_main_grad", "bias_main_grad"), autograd=True)
cpp.serve(scale_shift_backward, accepts)
triton.serve(scale_shift, without=("weight_main_grad", "bias_main_grad"))
triton.serve(scale_shift_backward)
