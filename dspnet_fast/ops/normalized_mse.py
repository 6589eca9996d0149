"""normalized_mse: mean_n (2 - 2 cos(p_n, z_n)), the regression loss of BYOL (arXiv:2006.07733, eq. 2)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .registry import operator

# The shortest length that a vector is divided by. BYOL's code bounds the squared length by 1e-12.
EPS = 1e-6


@operator()
def normalized_mse(p: Tensor, z: Tensor) -> Tensor:
    """The squared distance of p and z after both were scaled to unit length, averaged over the batch.

    p, z: [N, D], floating point, of one shape. Returns a scalar in [0, 4], computed and returned in fp32, or in fp64
    if an input is. Differentiable in both. A zero vector has cosine 0; N = 0 gives NaN, as a mean over nothing does.
    Raises RuntimeError for other shapes or integers.
    """
    torch._check(
        p.ndim == 2 and p.shape == z.shape and p.is_floating_point() and z.is_floating_point(),
        lambda: (
            "normalized_mse: p and z must be floating point and both [N, D], "
            f"got {tuple(p.shape)} {p.dtype} and {tuple(z.shape)} {z.dtype}"
        ),
    )
    p, z = _widen(p, z)
    return (2 - 2 * (F.normalize(p, eps=EPS) * F.normalize(z, eps=EPS)).sum(1)).mean()


def _widen(p: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(p.dtype, z.dtype), torch.float32)
    return p.to(dtype), z.to(dtype)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """d cos / dp = (z / |z| - cos p / |p|) / |p|; below EPS the divisor is a constant and the second term is gone."""
    inputs = ctx.saved_tensors
    wide = _widen(*inputs)
    lengths = [v.norm(dim=1, keepdim=True) for v in wide]
    units = [v / length.clamp_min(EPS) for v, length in zip(wide, lengths, strict=True)]
    cosine = (units[0] * units[1]).sum(1, keepdim=True)

    def gradient(own: int, other: int) -> Tensor | None:
        if not ctx.needs_input_grad[own]:
            return None
        along = torch.where(lengths[own] > EPS, cosine, 0) * units[own]
        scale = -2 * grad / (len(inputs[own]) * lengths[own].clamp_min(EPS))
        return (scale * (units[other] - along)).to(inputs[own].dtype)

    return gradient(0, 1), gradient(1, 0)


normalized_mse.register_autograd(_backward, _setup_context)
