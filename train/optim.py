"""LARS as BYOL uses it (You et al. 2017; Grill et al. 2020, appendix)."""

from collections.abc import Iterable

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with momentum. For every parameter p with gradient g:

        g' = g + weight_decay p        q = eta |p| / |g'|, or 1 if either norm is 0
        m <- momentum m + q g'         p <- p - lr m

    Tensors of at most one dimension (biases, batch normalisation) get neither weight decay nor adaptation.
    Norms stay on the device: a step makes no host synchronisation.

    Args:
        params: parameters; those without a gradient are left alone.
        lr: learning rate; usually set anew before every step through `param_groups`.
        eta: trust coefficient.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.2,
        momentum: float = 0.9,
        weight_decay: float = 1.5e-6,
        eta: float = 1e-3,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            updates = [p.grad for p in params]
            adapted = [index for index, p in enumerate(params) if p.ndim > 1]
            if adapted:
                weights = [params[index] for index in adapted]
                decayed = torch._foreach_add([updates[i] for i in adapted], weights, alpha=group["weight_decay"])
                weight_norms = torch.stack(torch._foreach_norm(weights))
                gradient_norms = torch.stack(torch._foreach_norm(decayed))
                ratio = group["eta"] * weight_norms / gradient_norms
                trust = torch.where((weight_norms > 0) & (gradient_norms > 0), ratio, torch.ones_like(ratio))
                torch._foreach_mul_(decayed, list(trust.unbind()))
                for index, update in zip(adapted, decayed, strict=True):
                    updates[index] = update
            momenta = [self.state[p]["momentum"] for p in params]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, updates)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])
