"""lars_ema_step: the optimizer step with LARS and the target update, on flat buffers (You et al. 2017; BYOL)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpp, cuda
from .registry import operator


def _check_buffers(params: Tensor, grads: Tensor, momenta: Tensor, targets: Tensor) -> None:
    flats = {"params": params, "grads": grads, "momenta": momenta, "targets": targets}
    for name, flat in flats.items():
        if flat.layout != torch.strided or flat.ndim != 1 or not flat.is_contiguous():
            raise RuntimeError(f"lars_ema_step: {name} must be a contiguous vector, got {tuple(flat.shape)}")
        fits = flat.dtype in (torch.float32, torch.float64) and flat.dtype == params.dtype
        if not fits or flat.device != params.device:
            raise RuntimeError(
                f"lars_ema_step: all must be float32 or all float64, on one device: {name} is {flat.dtype} on "
                f"{flat.device}, params is {params.dtype} on {params.device}"
            )
    if not len(grads) == len(momenta) == len(params) >= len(targets):
        raise RuntimeError(
            "lars_ema_step: grads and momenta must be as long as params and targets no longer, got "
            + ", ".join(f"{len(flat)} {name}" for name, flat in flats.items())
        )
    spans = sorted((flat.data_ptr(), flat.data_ptr() + flat.nbytes, name) for name, flat in flats.items() if len(flat))
    for (_, end, name), (start, _, other) in zip(spans, spans[1:], strict=False):
        if start < end:
            raise RuntimeError(f"lars_ema_step: {name} and {other} share memory")


def _check_segments(params: Tensor, starts: Sequence[int], sizes: Sequence[int]) -> None:
    if len(starts) != len(sizes):
        raise RuntimeError(f"lars_ema_step: {len(starts)} starts but {len(sizes)} sizes")
    end = 0
    for segment, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        if start < end or size < 0 or start + size > len(params):
            raise RuntimeError(
                f"lars_ema_step: segment {segment}, {size} elements from {start}, must start at {end} or later and end "
                f"at {len(params)} or earlier"
            )
        end = start + size


def _check_scalars(params: Tensor, lr: Tensor, tau: Tensor, apply: Tensor | None) -> None:
    for name, scalar in {"lr": lr, "tau": tau}.items():
        if scalar.ndim != 0 or not scalar.is_floating_point() or scalar.device != params.device:
            raise RuntimeError(
                f"lars_ema_step: {name} must be a floating-point scalar on {params.device}, got {tuple(scalar.shape)} "
                f"{scalar.dtype} on {scalar.device}"
            )
    if apply is not None and (apply.ndim != 0 or apply.dtype != torch.bool or apply.device != params.device):
        raise RuntimeError(
            f"lars_ema_step: apply must be a bool scalar on {params.device}, got {tuple(apply.shape)} {apply.dtype} on "
            f"{apply.device}"
        )


@operator(
    mutates=("params", "grads", "momenta", "targets"),
    checks=(_check_buffers, _check_segments, _check_scalars),
)
def lars_ema_step(
    params: Tensor,
    grads: Tensor,
    momenta: Tensor,
    targets: Tensor,
    starts: Sequence[int],
    sizes: Sequence[int],
    lr: Tensor,
    tau: Tensor,
    weight_decay: float,
    momentum: float,
    eta: float,
    apply: Tensor | None = None,
) -> None:
    """One LARS step of the online network and one EMA step of the target network, in place. For every adapted segment:

        g' = g + weight_decay p        q = eta |p| / |g'|, or 1 if either norm is 0

    and g' = g, q = 1 for every other element. Then for all:

        m = momentum m + q g'        p = p - lr m        target = tau target + (1 - tau) p        g = 0

    Does not synchronise with the device. A NaN or infinite gradient element gives NaN in its segment and nowhere else.

    Args:
        params: parameters of the online network, [N], contiguous, float32 or float64.
        grads: their gradients, [N]; set to zero.
        momenta: their momenta, [N].
        targets: parameters of the target network, [T] with T <= N, which follow the first T of params. All four buffers
            have one dtype and device and share no memory.
        starts: first elements of the adapted segments, the tensors of more than one dimension, in ascending order.
            Biases, batch normalisation and padding lie between them.
        sizes: numbers of elements of the adapted segments, which do not overlap.
        lr: learning rate, a floating-point scalar on the same device, so that a captured CUDA graph can be replayed
            with another value.
        tau: decay rate of the target, likewise. It must be in [0, 1], which is not checked, as that would synchronise.
        weight_decay: factor of the parameters in g'.
        momentum: factor of the previous momenta.
        eta: trust coefficient.
        apply: bool scalar on the same device; if it is false, only the gradients are set to zero.

    Raises:
        RuntimeError: if buffers, segments or scalars do not fit.

    Example:
        >>> params, grads, momenta, targets = torch.ones(4), torch.ones(4), torch.zeros(4), torch.zeros(4)
        >>> lr, tau = torch.tensor(0.5), torch.tensor(0.5)
        >>> lars_ema_step(params, grads, momenta, targets, [], [], lr, tau, 0.0, 0.9, 1e-3)
        >>> params, targets
        (tensor([0.5000, 0.5000, 0.5000, 0.5000]), tensor([0.2500, 0.2500, 0.2500, 0.2500]))
    """
    changing = (params, momenta, targets)
    before = [] if apply is None else [flat.clone() for flat in changing]
    to_online = (1 - tau).to(params.dtype)
    if starts:
        weights, updates = (
            [flat.narrow(0, start, size) for start, size in zip(starts, sizes, strict=True)] for flat in (params, grads)
        )
        torch._foreach_add_(updates, weights, alpha=weight_decay)
        weight_norms, update_norms = (torch.stack(torch._foreach_norm(segments)) for segments in (weights, updates))
        ratio = eta * weight_norms / update_norms
        trust = torch.where((weight_norms == 0) | (update_norms == 0), 1, ratio)
        torch._foreach_mul_(updates, list(trust.unbind()))
    momenta.mul_(momentum).add_(grads)
    params.addcmul_(momenta, lr.to(params.dtype), value=-1)
    targets.lerp_(params[: len(targets)], to_online)
    grads.zero_()
    if apply is not None:
        for flat, kept in zip(changing, before, strict=True):
            torch.where(apply, flat, kept, out=flat)


cpp.serve(lars_ema_step)
cuda.serve(lars_ema_step)
