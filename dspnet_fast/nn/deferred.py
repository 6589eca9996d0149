"""Activations with deferred normalisation (docs/formulation.md).

A convolution's output is stored raw. The scale, shift, activation function and gate that follow it are applied by the
next operator while it loads the tensor, so that the normalised activation is never written to memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConvOutput:
    """A convolution's output with its moments per view.

    Attributes:
        y: the output, [N, C, H, W].
        mean: mean of each view, [V, C]; [0, C] if no moments were computed.
        variance: biased variance of each view, of the same shape.
    """

    y: Tensor
    mean: Tensor
    variance: Tensor

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


Activation = Deferred | Tensor
