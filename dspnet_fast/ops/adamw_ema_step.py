"""adamw_ema_step: the optimizer step with AdamW and the target update, on flat buffers (Loshchilov & Hutter 2019)."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpp, cuda
from .flat_step import blocks, check_buffers, check_scalars, check_segments, read_on_cpu
from .registry import operator


def _check_buffers(params: Tensor, grads: Tensor, momenta: Tensor, variances: Tensor, targets: Tensor) -> None:
    flats = {"params": params, "grads": grads, "momenta": momenta, "variances": variances}
    check_buffers("adamw_ema_step", flats, targets)


def _check_scalars(
    params: Tensor, steps: Tensor, lr: Tensor, weight_decay: Tensor, tau: Tensor, apply: Tensor | None
) -> None:
    scalars = {"steps": steps, "lr": lr, "weight_decay": weight_decay, "tau": tau}
    check_scalars("adamw_ema_step", params, scalars, apply)


@operator(
    mutates=("params", "grads", "momenta", "variances", "targets", "steps"),
    checks=(_check_buffers, functools.partial(check_segments, "adamw_ema_step"), _check_scalars),
)
def adamw_ema_step(
    params: Tensor,
    grads: Tensor,
    momenta: Tensor,
    variances: Tensor,
    targets: Tensor,
    steps: Tensor,
    starts: Sequence[int],
    sizes: Sequence[int],
    lr: Tensor,
    weight_decay: Tensor,
    tau: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    apply: Tensor | None = None,
) -> None:
    """One AdamW step of the online network and one EMA step of the target network, in place.

        t = t + 1        p = (1 - lr weight_decay) p, in decayed segments only
        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        p = p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
        target = tau target + (1 - tau) p        g = 0

    Does not synchronise with the device. A NaN or infinite gradient element gives NaN in its element and nowhere else.

    Args:
        params: parameters of the online network, [N], contiguous, float32 or float64.
        grads: their gradients, [N]; set to zero.
        momenta: moving averages of the gradients, m, [N].
        variances: moving averages of their squares, v, [N].
        targets: parameters of the target network, [T] with T <= N, which follow the first T of params. All five buffers
            have one dtype and device and share no memory.
        steps: number of steps done, t, a floating-point scalar on the same device; float64 counts all of them exactly.
        starts: first elements of the decayed segments, the tensors of more than one dimension, in ascending order.
        sizes: numbers of elements of the decayed segments, which do not overlap.
        lr: learning rate, a floating-point scalar on the same device, so that a captured CUDA graph can be replayed
            with another value.
        weight_decay: decoupled weight decay, likewise, so that it can follow a schedule.
        tau: decay rate of the target, likewise. It must be in [0, 1], which is not checked, as that would synchronise.
        beta1: decay rate of momenta.
        beta2: decay rate of variances.
        eps: added to the denominator.
        apply: bool scalar on the same device; if it is false, only the gradients are set to zero.

    Raises:
        RuntimeError: if buffers, segments or scalars do not fit.

    Example:
        >>> params, grads, targets = torch.ones(4), torch.ones(4), torch.zeros(4)
        >>> momenta, variances, steps = torch.zeros(4), torch.zeros(4), torch.tensor(0.0)
        >>> lr, decay, tau = torch.tensor(0.5), torch.tensor(0.0), torch.tensor(0.5)
        >>> adamw_ema_step(
        ...     params, grads, momenta, variances, targets, steps, [], [], lr, decay, tau, 0.9, 0.999, 1e-8
        ... )
        >>> params, targets, steps
        (tensor([0.5000, 0.5000, 0.5000, 0.5000]), tensor([0.2500, 0.2500, 0.2500, 0.2500]), tensor(1.))
    """
    applied, apply = read_on_cpu(apply)
    if not applied:
        grads.zero_()
        return
    lr, weight_decay, to_online = lr.double(), weight_decay.double(), 1 - tau.double()
    first, second = lr.new_full((), 1 - beta1), lr.new_full((), beta2)
    if apply is None:
        steps.add_(1)
    else:  # if it is false, nothing is added to anything
        steps.add_(apply)
        lr, to_online, first = (torch.where(apply, scalar, 0) for scalar in (lr, to_online, first))
        second = torch.where(apply, second, 1)
    done = steps.double().clamp(min=1)
    step_size, correction = lr / (1 - beta1**done), (1 - beta2**done).rsqrt()
    kept, first, second, correction, step_size, to_online = (
        scalar.to(params.dtype) for scalar in (1 - lr * weight_decay, first, second, correction, step_size, to_online)
    )
    decayed = [params.narrow(0, start, size) for start, size in zip(starts, sizes, strict=True)]
    for (p, g, m, v, target), segments in blocks((params, grads, momenta, variances, targets), starts):
        if apply is not None:
            g.masked_fill_(~apply, 0)
        if starts:
            torch._foreach_mul_(decayed[segments], kept)
        m.lerp_(g, first)
        v.mul_(second).addcmul_(g, g, value=1 - beta2)
        denominators = v.sqrt().mul_(correction).add_(eps)
        p.sub_((m / denominators).mul_(step_size))
        target.lerp_(p[: len(target)], to_online)
        g.zero_()


cpp.serve(adamw_ema_step)
cuda.serve(adamw_ema_step)
