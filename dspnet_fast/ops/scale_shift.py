"""scale_shift: batch normalisation as a scale and a shift per channel, computed from moments by one operator."""

import functools
from typing import Any

import torch
from torch import Tensor

from . import cpp, triton
from .main_grad import alike, gradient_buffer
from .registry import operator


@operator()
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
    _check(mean, variance, weight, weight_main_grad, bias, bias_main_grad)
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * _prefix(weight, mean)
    return scale, -mean * scale if bias is None else _prefix(bias, mean) - mean * scale


def _check(
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    weight_main_grad: Tensor | None,
    bias: Tensor | None,
    bias_main_grad: Tensor | None,
) -> None:
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
    _check_main_grad("weight", weight, weight_main_grad)
    _check_main_grad("bias", bias, bias_main_grad)


def _check_main_grad(name: str, vector: Tensor | None, main_grad: Tensor | None) -> None:
    torch._check(
        alike(main_grad, vector), lambda: f"scale_shift: {name}_main_grad must have the shape and dtype of {name}"
    )


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
    channels = mean.shape[1]
    rsqrt = (variance + eps).rsqrt()
    scale = rsqrt if weight is None else rsqrt * _prefix(weight, mean)
    grad = grad_scale - mean * grad_shift
    returned = []
    for vector, main_grad, of_prefix in (
        (weight, weight_main_grad, grad * rsqrt),
        (bias, bias_main_grad, grad_shift),
    ):
        if vector is None:
            of_vector = mean.new_empty(0)
        else:
            buffer, of_vector = gradient_buffer(vector, main_grad)
            buffer[:channels] += of_prefix.sum(0)
        returned.append(of_vector)
    of_weight, of_bias = returned
    return -grad_shift * scale, -grad * scale * rsqrt.square() / 2, of_weight, of_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    mean, variance, weight, weight_main_grad, bias, bias_main_grad, ctx.eps = inputs
    ctx.save_for_backward(mean, variance, weight, bias)
    ctx.main_grads = weight_main_grad, bias_main_grad  # not saved for backward: autograd rejects changed tensors


def _backward(ctx: Any, grad_scale: Tensor, grad_shift: Tensor) -> tuple[Any, ...]:
    mean, variance, weight, bias = ctx.saved_tensors
    of_mean, of_variance, of_weight, _, of_bias, _, _ = ctx.needs_input_grad
    # A frozen vector's main_grad must not change.
    weight_main_grad, bias_main_grad = (
        main_grad if wanted else None for main_grad, wanted in zip(ctx.main_grads, (of_weight, of_bias), strict=True)
    )
    grad_mean, grad_variance, grad_weight, grad_bias = scale_shift_backward(
        grad_scale, grad_shift, mean, variance, weight, weight_main_grad, bias, bias_main_grad, ctx.eps
    )
    return (
        grad_mean if of_mean else None,
        grad_variance if of_variance else None,
        grad_weight if of_weight and weight_main_grad is None else None,
        None,
        grad_bias if of_bias and bias_main_grad is None else None,
        None,
        None,
    )


scale_shift.register_autograd(_backward, _setup_context)


def _accepts(*args: Any) -> tuple[bool, str]:
    if any(isinstance(arg, Tensor) and arg.dtype != torch.float32 for arg in args):
        return False, "it supports float32 only"
    return True, ""


def _triton_accepts(*args: Any) -> tuple[bool, str]:
    return triton.kernels("scale_shift").accepts(*(arg for arg in args if isinstance(arg, Tensor)))


@scale_shift.provider("cpp", devices=("cpu",), supported=functools.partial(cpp.has, "scale_shift"), accepts=_accepts)
def _cpp(
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    weight_main_grad: Tensor | None,
    bias: Tensor | None,
    bias_main_grad: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    _check_main_grad("weight", weight, weight_main_grad)  # the compiled forward does not take them
    _check_main_grad("bias", bias, bias_main_grad)
    return torch.ops.dspnet_cpp.scale_shift(mean, variance, weight, bias, eps)


@scale_shift.provider(
    "triton",
    devices=triton.DEVICES,
    supported=triton.supported,
    accepts=_triton_accepts,
    unproven=triton.UNPROVEN,
)
def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    _check(*args[:6])
    mean, variance, weight, _, bias, _, eps = args
    return triton.kernels("scale_shift").scale_shift(mean, variance, weight, bias, eps)


cpp.serve(scale_shift_backward, _accepts)
triton.serve(scale_shift_backward, _triton_accepts)
