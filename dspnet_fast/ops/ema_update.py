"""ema_update: xi <- tau xi + (1 - tau) theta, the update of the target network (BYOL, arXiv:2006.07733, eq. 1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import apex, cpp, cuda, triton
from .registry import operator


def _check(targets: Sequence[Tensor], onlines: Sequence[Tensor], tau: float) -> None:
    if not 0 <= tau <= 1:
        raise RuntimeError(f"ema_update: tau must lie in [0, 1], got {tau}")
    if len(targets) != len(onlines):
        raise RuntimeError(f"ema_update: {len(targets)} targets but {len(onlines)} onlines")
    for i, (target, online) in enumerate(zip(targets, onlines, strict=True)):
        kinds = [(tuple(t.shape), t.dtype, t.device) for t in (target, online)]
        if kinds[0] != kinds[1] or not target.is_floating_point():
            raise RuntimeError(
                f"ema_update: target {i} and its online tensor must be floating point and of one shape, dtype and "
                "device, got " + " and ".join(f"{list(shape)} {dtype} {device}" for shape, dtype, device in kinds)
            )


@operator(mutates=("targets",), checks=(_check,))
def ema_update(targets: Sequence[Tensor], onlines: Sequence[Tensor], tau: float) -> None:
    """Move every target towards its online tensor, in place: target = tau * target + (1 - tau) * online.

    fp16 and bf16 are computed in fp32 and rounded once. Autograd records nothing.

    Args:
        targets: floating-point tensors of any strides; changed in place.
        onlines: as many tensors, each of the shape, dtype and device of its target.
        tau: decay rate in [0, 1]; 1 leaves the targets unchanged, 0 copies the onlines.

    Raises:
        RuntimeError: if the tensors do not match pair by pair or tau is outside [0, 1].

    Example:
        >>> target, online = torch.zeros(2), torch.ones(2)
        >>> ema_update([target], [online], tau=0.75)
        >>> target
        tensor([0.2500, 0.2500])
    """
    if targets:
        torch._foreach_lerp_(list(targets), list(onlines), 1 - tau)


cpp.serve(ema_update)
cuda.serve(ema_update)
triton.serve(ema_update)


@ema_update.provider(
    "apex", devices=("cuda",), supported=apex.supported, accepts=apex.accepts, only_by_name=apex.ONLY_BY_NAME
)
def _apex(targets: Sequence[Tensor], onlines: Sequence[Tensor], tau: float) -> None:
    _check(targets, onlines, tau)
    apex.ema_update(targets, onlines, tau)
