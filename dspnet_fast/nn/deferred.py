"""Activations with deferred normalisation (docs/formulation.md).

A convolution's output is stored raw. The scale, shift, activation function and gate that follow it are applied by the
next operator while it loads the tensor, so that the normalised activation is never written to memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops import norm_act
from ..ops.norm_act_pool import pool_deferred


@dataclass(frozen=True)
class ConvOutput:
    """A convolution's output with its moments per view.

    Attributes:
        y: the output, [N, C, H, W].
        mean: mean of each view, [V, C]; [0, C] if no moments were computed.
        variance: biased variance of each view, of the same shape.
        scale: scale of the batch normalisation by these moments, [V, C], if the convolution has computed it. Then mean
            and variance have no gradients.
        shift: like scale.
    """

    y: Tensor
    mean: Tensor
    variance: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """[N, C, H, W]."""
        return self.y.shape


@dataclass(frozen=True)
class Deferred:
    """The activation act(scale * x + shift) * gate, not yet computed; `functional.materialize` computes it.

    Attributes:
        x: raw output of a convolution, [N, C, H, W], channels-last.
        scale: [V, C], a row for each of V views or one row for all, or None for no normalisation.
        shift: like scale.
        act: activation function, one of `dspnet_fast.ops.deferred.ACTS`.
        gate: factor per image and channel, [N, C], or None.
    """

    x: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    act: str = "identity"
    gate: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """[N, C, H, W]."""
        return self.x.shape

    @property
    def is_affine(self) -> bool:
        """Whether neither an activation function nor a gate is deferred."""
        return self.act == "identity" and self.gate is None


Activation = Deferred | Tensor


def compute(x: Deferred, shortcut: Deferred | None = None, act: str = "identity") -> Tensor:
    """The activation as a tensor; with a shortcut, act(x + shortcut)."""
    if shortcut is None:
        return norm_act(x.x, x.scale, x.shift, x.act, x.gate, None, None, None)
    if not x.is_affine:
        x = Deferred(compute(x))
    if not shortcut.is_affine:
        shortcut = Deferred(compute(shortcut))
    return norm_act(x.x, x.scale, x.shift, act, None, shortcut.x, shortcut.scale, shortcut.shift)


def mean(x: Deferred) -> Tensor:
    """The mean over H and W, [N, C], in fp32, or fp64 if x is."""
    if x.gate is not None:
        return x.gate * mean(replace(x, gate=None))
    return pool_deferred(x.x, x.scale, x.shift, x.act)


def gate_by(x: Deferred, gate: Tensor) -> Deferred:
    """x times a factor per image and channel, [N, C]."""
    return replace(x, gate=gate if x.gate is None else x.gate * gate)
