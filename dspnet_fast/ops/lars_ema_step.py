"""lars_ema_step: the optimizer step with LARS and the target update, on flat buffers (You et al. 2017; BYOL)."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpp, cuda
from .flat_step import blocks, check_buffers, check_scalars, check_segments, read_on_cpu
from .registry import operator


def _check_buffers(params: Tensor, grads: Tensor, momenta: Tensor, targets: Tensor) -> None:
    check_buffers("lars_ema_step", {"params": params, "grads": grads, "momenta": momenta}, targets)


def _check_scalars(params: Tensor, lr: Tensor, tau: Tensor, apply: Tensor | None) -> None:
    check_scalars("lars_ema_step", params, {"lr": lr, "tau": tau}, apply)


@operator(
    mutates=("params", "grads", "momenta", "targets"),
    checks=(_check_buffers, functools.partial(check_segments, "lars_ema_step"), _check_scalars),
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
    applied, apply = read_on_cpu(apply)
    if not applied:
        grads.zero_()
        return
    lr, to_online, decay = lr.to(params.dtype), (1 - tau).to(params.dtype), params.new_full((), momentum)
    if apply is not None:  # if it is false, nothing is added to anything
        lr, to_online, decay = torch.where(apply, lr, 0), torch.where(apply, to_online, 0), torch.where(apply, decay, 1)
    updates: list[Tensor] = []
    trust: list[Tensor] = []
    if starts:  # not block by block: a part that all cores have just read is slow to write if they share no cache
        weights, updates = (
            [flat.narrow(0, start, size) for start, size in zip(starts, sizes, strict=True)] for flat in (params, grads)
        )
        torch._foreach_add_(updates, weights, alpha=weight_decay)
        weight_norms, update_norms = (torch.stack(torch._foreach_norm(segments)) for segments in (weights, updates))
        ratio = eta * weight_norms / update_norms
        trust = list(torch.where((weight_norms == 0) | (update_norms == 0), 1, ratio).unbind())
    for (p, g, m, target), segments in blocks((params, grads, momenta, targets), starts):
        if starts:
            torch._foreach_mul_(updates[segments], trust[segments])
        if apply is not None:
            g.masked_fill_(~apply, 0)
        torch.addcmul(g, m, decay, out=m)
        p.addcmul_(m, lr, value=-1)
        target.lerp_(p[: len(target)], to_online)
        g.zero_()


cpp.serve(lars_ema_step)
cuda.serve(lars_ema_step)
