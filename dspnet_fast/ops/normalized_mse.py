"""normalized_mse: mean_n (2 - 2 cos(p_n, z_n)), the regression loss of BYOL (arXiv:2006.07733, eq. 2)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import cpp, cuda
from .registry import operator

# Lower bound of a vector's length in a division. BYOL's code bounds the squared length by 1e-12.
EPS = 1e-6


@operator()
def normalized_mse(p: Tensor, z: Tensor) -> Tensor:
    """Squared distance of p and z, each scaled to unit length, averaged over the batch.

    The cosine of a zero vector is 0. N = 0 gives NaN, the mean of no values.

    Args:
        p: predictions, [N, D], floating point.
        z: targets, [N, D], floating point.

    Returns:
        A scalar in [0, 4], in fp32, or fp64 if an input is. Differentiable twice in both inputs.

    Raises:
        RuntimeError: if the inputs are not floating point or not of one shape [N, D].

    Example:
        >>> p, z = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
        >>> normalized_mse(p, z)  # 2 - 2 cos(90 degrees)
        tensor(2.)
    """
    torch._check(
        p.ndim == 2 and p.shape == z.shape and p.is_floating_point() and z.is_floating_point(),
        lambda: (
            "normalized_mse: p and z must be floating point and both [N, D], "
            f"got {tuple(p.shape)} {p.dtype} and {tuple(z.shape)} {z.dtype}"
        ),
    )
    p, z = _upcast(p, z)
    return (2 - 2 * (F.normalize(p, eps=EPS) * F.normalize(z, eps=EPS)).sum(1)).mean()


def _upcast(p: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(p.dtype, z.dtype), torch.float32)
    return p.to(dtype), z.to(dtype)


@operator()
def normalized_mse_backward(
    grad: Tensor, p: Tensor, z: Tensor, p_gradient: bool, z_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of normalized_mse. With d the gradient of the loss, a scalar in its dtype,

        dp = -2 d / (N |p|) (z / |z| - cos p / |p|)        and for z likewise

    A length below EPS is replaced by the constant EPS, so the term with the cosine vanishes.

    Returns:
        dp and dz; an empty tensor for a gradient that is not requested.
    """
    inputs = p, z
    upcast = _upcast(p, z)
    lengths = [v.norm(dim=1, keepdim=True) for v in upcast]
    units = [v / length.clamp_min(EPS) for v, length in zip(upcast, lengths, strict=True)]
    cosine = (units[0] * units[1]).sum(1, keepdim=True)

    def gradient(own: int, other: int) -> Tensor:
        along = torch.where(lengths[own] > EPS, cosine, 0) * units[own]
        scale = -2 * grad / (len(p) * lengths[own].clamp_min(EPS))
        return (scale * (units[other] - along)).to(inputs[own].dtype)

    return gradient(0, 1) if p_gradient else p.new_empty(0), gradient(1, 0) if z_gradient else z.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    # Double backward: only the native body is differentiable.
    function = normalized_mse_backward.native if torch.is_grad_enabled() else normalized_mse_backward
    return function(grad, *ctx.saved_tensors, *ctx.needs_input_grad)


normalized_mse.register_autograd(_backward, _setup_context)


def _cuda_accepts(p: Tensor, z: Tensor) -> tuple[bool, str]:
    return p.dtype == z.dtype, f"it supports two inputs of one dtype, not {p.dtype} and {z.dtype}"


cpp.serve(normalized_mse)
cpp.serve(normalized_mse_backward)
cuda.serve(normalized_mse, accepts=_cuda_accepts)
cuda.serve(normalized_mse_backward, accepts=_cuda_accepts)
