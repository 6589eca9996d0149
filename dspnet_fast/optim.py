"""LARS and AdamW as `torch.optim.Optimizer`, each with the moving average of a target network as an option."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from .ops import adamw_ema_step, ema_update, lars_ema_step

ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class _Fused(torch.optim.Optimizer, ABC):
    """Updates one parameter after another, each by one call of an operator on its memory.

    Attributes:
        STATE: names of the tensors of a parameter's shape in its state.
    """

    STATE: tuple[str, ...]

    def __init__(self, params: ParamsT, defaults: dict[str, Any], targets: Mapping[Tensor, Tensor] | None) -> None:
        for name in ("lr", "weight_decay", "eps", "eta"):
            if not defaults.get(name, 0.0) >= 0:
                raise ValueError(f"{name} cannot be negative: {defaults[name]}")
        for name in ("momentum", "beta1", "beta2", "tau"):
            if not 0 <= defaults.get(name, 0.0) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not at {defaults[name]}")
        self._targets = dict(targets or {})
        super().__init__(params, defaults)
        own = {p for group in self.param_groups for p in group["params"]}
        for parameter, target in self._targets.items():
            if parameter not in own:
                raise ValueError("targets has a parameter that the optimizer does not train")
            if (target.shape, target.dtype, target.device) != (parameter.shape, parameter.dtype, parameter.device):
                raise ValueError(
                    f"a target of {list(target.shape)} {target.dtype} on {target.device} for a parameter of "
                    f"{list(parameter.shape)} {parameter.dtype} on {parameter.device}"
                )

    def __getstate__(self) -> dict[str, Any]:  # that of PyTorch's class holds known attributes only
        return super().__getstate__() | {"_targets": self._targets}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, float32 or float64 in memory without gaps."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"parameters must be float32 or float64, not {parameter.dtype}")
            if not _is_dense(parameter):
                raise ValueError(f"a parameter of {list(parameter.shape)} has gaps in its memory: make it contiguous")

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient, and all targets. The gradients are zero afterwards.

        Args:
            closure: computes the loss again, and its gradients.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            scalars: dict[torch.device, dict[str, Any]] = {}
            for parameter in group["params"]:
                target = self._targets.get(parameter)
                if parameter.grad is None:
                    if target is not None:
                        ema_update([target.detach()], [parameter.detach()], group["tau"])
                    continue
                if parameter.grad.is_sparse:
                    raise RuntimeError("sparse gradients are not supported")
                device = parameter.device
                if device not in scalars:
                    scalars[device] = {
                        name: torch.full((), group[name], dtype=torch.float64, device=device)
                        for name in ("lr", "weight_decay", "tau")
                    }
                self._update(parameter, target, group, scalars[device])
        return loss

    def _update(self, p: Tensor, target: Tensor | None, group: dict[str, Any], scalars: dict[str, Any]) -> None:
        state = self.state[p]
        for name in self.STATE:
            if name not in state:
                state[name] = torch.zeros_like(p)
            elif state[name].stride() != p.stride():  # loaded from a parameter in another memory format
                state[name] = torch.zeros_like(p).copy_(state[name])
        assert p.grad is not None
        if p.grad.stride() != p.stride():
            p.grad = torch.zeros_like(p).copy_(p.grad)
        if target is None:
            followed = p.new_empty(0)
        else:
            followed = _vector(target) if target.stride() == p.stride() else _vector(torch.zeros_like(p).copy_(target))
        starts, sizes = ([0], [p.numel()]) if p.ndim > 1 else ([], [])
        flat = {"params": _vector(p), "grads": _vector(p.grad), "targets": followed, "starts": starts, "sizes": sizes}
        self._step(flat, state, group, scalars)
        if target is not None and followed.data_ptr() != target.data_ptr():
            target.copy_(followed.as_strided(p.shape, p.stride()))

    @abstractmethod
    def _step(
        self, flat: dict[str, Any], state: dict[str, Any], group: dict[str, Any], scalars: dict[str, Any]
    ) -> None:
        """Call the operator.

        Args:
            flat: its arguments `params`, `grads`, `targets`, `starts` and `sizes`.
            state: the parameter's state.
            group: the parameter's group.
            scalars: `lr`, `weight_decay` and `tau` of the group as scalars on the parameter's device.
        """


class LARS(_Fused):
    """LARS with momentum (You et al. 2017), in the variant of BYOL. For tensors of two or more dimensions:

        g' = g + weight_decay p        q = eta |p| / |g'|, or 1 if either norm is 0

    and g' = g, q = 1 for vectors, such as biases and batch normalisation. Then m = momentum m + q g' and p = p - lr m.

    Args:
        params: parameters, or groups of them with their own `lr`, `momentum`, `weight_decay`, `eta` and `tau`. They are
            float32 or float64, dense, and of any memory format.
        lr: learning rate.
        momentum: factor of the previous momenta.
        weight_decay: factor of the parameters in g'.
        eta: trust coefficient.
        targets: tensors that follow parameters: target = tau target + (1 - tau) p, after the step.
        tau: decay rate of the targets.

    Raises:
        ValueError: if a value, a parameter or a target does not fit.

    Example:
        >>> online, target = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3).requires_grad_(False)
        >>> pairs = dict(zip(online.parameters(), target.parameters()))
        >>> optimizer = LARS(online.parameters(), lr=0.2, weight_decay=1e-6, targets=pairs, tau=0.99)
        >>> online(torch.randn(8, 4)).square().sum().backward()
        >>> optimizer.step()
    """

    STATE = ("momentum",)

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
        *,
        targets: Mapping[Tensor, Tensor] | None = None,
        tau: float = 0.99,
    ) -> None:
        values = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "tau": tau}
        super().__init__(params, values, targets)

    def _step(
        self, flat: dict[str, Any], state: dict[str, Any], group: dict[str, Any], scalars: dict[str, Any]
    ) -> None:
        numbers = {name: group[name] for name in ("weight_decay", "momentum", "eta")}
        lars_ema_step(**flat, momenta=_vector(state["momentum"]), lr=scalars["lr"], tau=scalars["tau"], **numbers)


class AdamW(_Fused):
    """AdamW (Loshchilov & Hutter 2019), equal to torch.optim.AdamW, without weight decay of vectors.

    Tensors of fewer than two dimensions, such as biases and batch normalisation, are not decayed.

    Args:
        params: parameters, or groups of them with their own `lr`, `beta1`, `beta2`, `eps`, `weight_decay` and `tau`.
            They are float32 or float64, dense, and of any memory format.
        lr: learning rate.
        beta1: decay rate of the average gradient.
        beta2: decay rate of the average squared gradient.
        eps: added to the denominator.
        weight_decay: decoupled weight decay; a parameter is multiplied by 1 - lr weight_decay.
        targets: tensors that follow parameters: target = tau target + (1 - tau) p, after the step.
        tau: decay rate of the targets.

    Raises:
        ValueError: if a value, a parameter or a target does not fit.

    Example:
        >>> network = torch.nn.Linear(4, 3)
        >>> optimizer = AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
        >>> network(torch.randn(8, 4)).square().sum().backward()
        >>> optimizer.step()
    """

    STATE = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        targets: Mapping[Tensor, Tensor] | None = None,
        tau: float = 0.99,
    ) -> None:
        values = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay, "tau": tau}
        super().__init__(params, values, targets)

    def _step(
        self, flat: dict[str, Any], state: dict[str, Any], group: dict[str, Any], scalars: dict[str, Any]
    ) -> None:
        steps = state.get("step", torch.zeros((), dtype=torch.float64))
        state["step"] = steps = steps.to(flat["params"].device)  # loading a state leaves it on the CPU
        momenta, variances = _vector(state["exp_avg"]), _vector(state["exp_avg_sq"])
        numbers = {name: group[name] for name in ("beta1", "beta2", "eps")}
        adamw_ema_step(**flat, momenta=momenta, variances=variances, steps=steps, **scalars, **numbers)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _vector(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of their memory, as a view."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))
