"""Layers of any class whose parameters are reduced to the active channels when they are read."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from .batch_norm import MomentumBatchNorm, MomentumBatchNorm1d, MomentumBatchNorm2d, SlimBatchNorm
from .deferred_tensor import DeferredTensor
from .functional import ACTS, act_name
from .prefix import Positions, select
from .recomputation import follow


class Selected(nn.Module):
    """Base class of layers that read only the active channels of their parameters and buffers.

    The forward method is that of the original class. State and parameters are full-size.

    Attributes:
        active_selection: positions of the active channels by name of the parameter or buffer; set by `activate`.
        original_class: the class of the layer before `slimmable`.
    """

    active_selection: Mapping[str, Positions] = {}
    original_class: type[nn.Module]
    _names: tuple[str, ...]
    _skips = False

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class is made at run time
        return _rebuild, (self.original_class, self._names, self._skips), self.__dict__


class Skippable(Selected):
    """Base class of blocks that a subnet may leave out.

    Attributes:
        skipped: whether the forward method returns its input; set by `activate`.
    """

    skipped = False
    _skips = True

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        follow()
        return x if self.skipped else super().forward(x, *args, **kwargs)


class SlimBatchNormAct(SlimBatchNorm):
    """timm's `BatchNormAct2d`: batch normalisation, then the layer's own dropout and activation function."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Any) -> Any:
        drop, act = self.drop, self.act
        if torch.compiler.is_compiling() or not (_does_nothing(drop) and type(act) in ACTS and _is_plain(act)):
            return act(drop(self._normalize(x)))
        y = self._normalize(x, act_name(act))
        return y if isinstance(y, DeferredTensor) else act(y)  # a call of a module takes longer than to defer


class MomentumBatchNormAct2d(SlimBatchNormAct, MomentumBatchNorm2d):
    """`MomentumBatchNorm2d`, then dropout and an activation function."""


def momentum_class(norm: SlimBatchNorm) -> type[MomentumBatchNorm]:
    """The class of momentum batch normalisation that replaces a layer."""
    if isinstance(norm, SlimBatchNormAct):
        return MomentumBatchNormAct2d
    return MomentumBatchNorm2d if isinstance(norm, nn.BatchNorm2d) else MomentumBatchNorm1d


def is_norm_act(kind: type[nn.Module]) -> bool:
    """Whether a class is a batch normalisation of timm with an activation function."""
    return issubclass(kind, _BatchNorm) and kind.__module__.startswith("timm.") and kind.__name__.endswith("NormAct2d")


def skippable_class(block: nn.Module) -> type[Selected]:
    """The subclass of a block's class that can be skipped."""
    if isinstance(block, Selected):
        return selected_class(block.original_class, block._names, skips=True)
    return selected_class(type(block), (), skips=True)


def selected_class(kind: type[nn.Module], names: tuple[str, ...], skips: bool = False) -> type[Selected]:
    """The subclass of a layer's class that reads the named parameters and buffers reduced to the active channels.

    Args:
        kind: the class of the layer.
        names: the parameters and buffers.
        skips: whether the layer is a block that can be skipped.
    """
    key = kind, names, skips
    if key not in _classes:
        bases: tuple[type, ...] = (Skippable if skips else Selected, kind)
        if is_norm_act(kind):
            bases = (Selected, SlimBatchNormAct, kind)
        elif issubclass(kind, _BatchNorm):
            bases = (Selected, SlimBatchNorm, kind)
        body: dict[str, Any] = {name: property(functools.partial(_read, name=name)) for name in names}
        body |= {"original_class": kind, "_names": names, "__module__": __name__, "__doc__": kind.__doc__}
        _classes[key] = type(f"Slim{kind.__name__}", bases, body)
    return _classes[key]


_classes: dict[tuple[type[nn.Module], tuple[str, ...], bool], type[Selected]] = {}


def _read(module: Selected, name: str) -> Tensor | None:
    follow()
    tensor = module._parameters[name] if name in module._parameters else module._buffers[name]
    positions = module.active_selection.get(name)
    return tensor if tensor is None or positions is None else select(tensor, positions)


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of a module does what its class does: no hooks and no other forward method."""
    state = module.__dict__
    hooks = state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"]
    return not (hooks or state["_backward_pre_hooks"] or "forward" in state or _has_any_global_hook())


def _does_nothing(module: nn.Module) -> bool:
    """Whether a call of a module returns its argument, unseen by anybody."""
    return type(module) is nn.Identity and _is_plain(module)


def _rebuild(kind: type[nn.Module], names: tuple[str, ...], skips: bool) -> Selected:
    made = selected_class(kind, names, skips)
    return made.__new__(made)
