"""Flat buffers: online parameters, gradients, momentum, target and running statistics, one flat tensor each.

The update of all parameters is one operator (`lars_ema_step` or `adamw_ema_step`), and an all-reduce is one call.
Parameters remain tensors of a module, with their names, shapes, strides and state_dict.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dspnet_fast.machine import scalar_dtype
from dspnet_fast.ops import adamw_ema_step, lars_ema_step

ADAMW_EPS = 1e-8
ALIGNMENT = 64  # bytes: a cache line, the widest vector, and more than a GPU's widest load


class FlatBuffers:
    """Turns the parameters of two modules into views of flat tensors, gives them gradients, and updates them.

    A parameter, its gradient, its momentum and its target have the same offset in their flat tensors, aligned to
    ALIGNMENT bytes, and the same strides. Parameters with a target come first. The padding between them is zero.

    Operators that use a prefix of a weight add its gradient to the same prefix of the flat gradient (`main_grad`), and
    autograd accumulates other gradients there. Replacing a parameter's memory or gradient afterwards (`zero_grad`,
    `to`) is therefore an error in the next `update`.

    Args:
        online: module trained by gradients. Parameters that require none, such as fixed position embeddings of
            transformers, stay outside of the buffers, here and in the target.
        target: module that follows the online parameters of the same names; it may have fewer.
        optimizer: "lars" or "adamw", which needs memory for the variances too.

    Raises:
        ValueError: if the modules do not match, or have parameters of several dtypes or on several devices.

    Attributes:
        params, grads, momenta: [N].
        variances: [N] with AdamW, the moving averages of squared gradients; otherwise [0].
        steps: number of AdamW's steps, a scalar.
        targets: [T], the moving averages of the first T elements of `params`.
        statistics: [S], all floating-point buffers, which are batch normalisation's running statistics.
    """

    def __init__(self, online: nn.Module, target: nn.Module, optimizer: str = "lars") -> None:
        parameters, targets = dict(online.named_parameters()), dict(target.named_parameters())
        _check(parameters, targets)
        parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        targets = {name: target for name, target in targets.items() if name in parameters}
        self._parameters = {name: parameters[name] for name in (*targets, *parameters)}
        example = next(iter(parameters.values()))
        aligned = ALIGNMENT // example.element_size()
        self._starts: dict[str, int] = {}
        total = with_target = 0
        for name, parameter in self._parameters.items():
            self._starts[name] = total
            total += -(-parameter.numel() // aligned) * aligned
            if name in targets:
                with_target = total
        self.params, self.grads, self.momenta = (example.detach().new_zeros(total) for _ in range(3))
        self.targets = example.detach().new_zeros(with_target)
        self.variances = example.detach().new_zeros(total if optimizer == "adamw" else 0)
        self.steps, self._lr, self._tau, self._weight_decay = (
            torch.zeros((), dtype=scalar_dtype(example.device), device=example.device) for _ in range(4)
        )

        adapted = [name for name, parameter in self._parameters.items() if parameter.ndim > 1]
        self._adapted_starts = [self._starts[name] for name in adapted]
        self._adapted_sizes = [parameters[name].numel() for name in adapted]

        for name, parameter in self._parameters.items():
            parameter.data = self._view(self.params, name).copy_(parameter.data)
            parameter.grad = self._view(self.grads, name)
            parameter.main_grad = parameter.grad  # type: ignore[attr-defined]  # operators add to its prefix
        for name, parameter in targets.items():
            parameter.data = self._view(self.targets, name).copy_(parameter.data)
        self.statistics = _flatten_buffers(online, target)
        self._gradients = [(name, p, p.grad) for name, p in self._parameters.items()]
        self._addresses = [
            (name, p, p.data_ptr()) for tensors in (self._parameters, targets) for name, p in tensors.items()
        ]

    def _view(self, flat: Tensor, name: str) -> Tensor:
        """The view of one parameter, in its shape and strides (contiguous ones if its own leave gaps)."""
        strides = torch.empty_like(self._parameters[name], device="meta").stride()
        return flat.as_strided(self._parameters[name].shape, strides, self._starts[name])

    def start(self, part: str) -> int:
        """Offset of the first parameter of an online submodule in `params` and `grads`."""
        return next(start for name, start in self._starts.items() if name.startswith(f"{part}."))

    def schedule(self, lr: float, tau: float, weight_decay: float = 0.0) -> None:
        """Set learning rate, target decay and AdamW's weight decay for the next update, on the device."""
        self._lr.fill_(lr)
        self._tau.fill_(tau)
        self._weight_decay.fill_(weight_decay)

    @torch.no_grad()
    def update(self, *, weight_decay: float, momentum: float, eta: float, apply: Tensor | None = None) -> None:
        """LARS with the accumulated gradients, then target <- tau target + (1 - tau) online, then g = 0.

        Where `apply`, a bool scalar on the device, is false, only g = 0 is done. Does not synchronise the host.
        Raises RuntimeError if a parameter or gradient is no longer a view of the flat buffers.
        """
        self._check_views()
        lars_ema_step(
            self.params,
            self.grads,
            self.momenta,
            self.targets,
            self._adapted_starts,
            self._adapted_sizes,
            self._lr,
            self._tau,
            weight_decay,
            momentum,
            eta,
            apply,
        )

    @torch.no_grad()
    def update_adamw(self, *, beta1: float, beta2: float, apply: Tensor | None = None) -> None:
        """As `update`, by AdamW with the scheduled weight decay."""
        self._check_views()
        adamw_ema_step(
            self.params,
            self.grads,
            self.momenta,
            self.variances,
            self.targets,
            self.steps,
            self._adapted_starts,
            self._adapted_sizes,
            self._lr,
            self._weight_decay,
            self._tau,
            beta1,
            beta2,
            ADAMW_EPS,
            apply,
        )

    def _check_views(self) -> None:
        for name, parameter, gradient in self._gradients:
            if parameter.grad is not gradient:
                raise RuntimeError(
                    f"the gradient of {name} was replaced: `update` zeroes gradients, zero_grad must not"
                )
        for name, parameter, address in self._addresses:
            if parameter.data_ptr() != address:
                raise RuntimeError(f"the memory of {name} was replaced: create FlatBuffers after moving the modules")

    def step(self, lr: float, tau: float, *, weight_decay: float, momentum: float, eta: float) -> None:
        """`schedule` and `update` in one."""
        self.schedule(lr, tau)
        self.update(weight_decay=weight_decay, momentum=momentum, eta=eta)

    def checksum(self) -> list[int]:
        """Equal for flat buffers with bit-identical weights, momentum, target and statistics."""
        flats = (self.params, self.momenta, self.variances, self.targets, self.statistics)
        return [int(flat.view({4: torch.int32, 8: torch.int64}[flat.element_size()]).sum()) for flat in flats]

    def momentum(self) -> dict[str, Tensor]:
        """The momentum of every parameter by name, as views."""
        return {name: self._view(self.momenta, name) for name in self._parameters}

    def variance(self) -> dict[str, Tensor]:
        """AdamW's variance of every parameter by name, as views."""
        return {name: self._view(self.variances, name) for name in self._parameters}

    def load_momentum(self, momentum: Mapping[str, Tensor]) -> None:
        """Load a result of `momentum`, of these or other flat buffers; ValueError if names or shapes differ."""
        _load("momentum", self.momentum(), momentum)

    def load_variance(self, variance: Mapping[str, Tensor]) -> None:
        """Load a result of `variance`, as `load_momentum`."""
        _load("variance", self.variance(), variance)


def _load(kind: str, own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    if loaded.keys() != own.keys():
        raise ValueError(f"the {kind} of {min(loaded.keys() ^ own.keys())} is missing, or not of this network")
    for name, value in own.items():
        if loaded[name].shape != value.shape:
            raise ValueError(f"the {kind} of {name} is {list(loaded[name].shape)}, not {list(value.shape)}")
    for name, value in own.items():
        value.copy_(loaded[name])


def _flatten_buffers(*modules: nn.Module) -> Tensor:
    """Turn all floating-point buffers into views of one flat tensor."""
    found = [
        (owner, name, buffer)
        for module in modules
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
        if buffer.is_floating_point()
    ]
    if not found:
        return next(modules[0].parameters()).detach().new_zeros(0)
    flat = torch.cat([buffer.flatten() for _, _, buffer in found])
    for (owner, name, buffer), part in zip(found, flat.split([b.numel() for _, _, b in found]), strict=True):
        # Views would share one count of changes in place: autograd would reject a saved filter after running statistics
        # have changed.
        setattr(owner, name, part.view_as(buffer).data)
    return flat


def _check(parameters: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError("the online module has no parameters that require a gradient")
    for name, target in targets.items():
        if name not in parameters or parameters[name].shape != target.shape:
            raise ValueError(f"the target's parameter {name} has no online parameter of its shape")
    everything = [*parameters.values(), *targets.values()]
    kinds = {(tensor.dtype, tensor.device) for tensor in everything}
    if len(kinds) > 1:
        raise ValueError(f"parameters of several kinds: {', '.join(sorted(map(str, kinds)))}")
