"""Activations that are deferred their normalisation: what a convolution left in memory, and what the next operator
applies
as it reads (docs/formulation.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConvOutput:
    """Output [N, C, H, W] of a convolution and its moments per view, mean and biased variance [V, C]."""

    y: Tensor
    mean: Tensor
    variance: Tensor

    @property
    def shape(self) -> torch.Size:
        """[N, C, H, W]."""
        return self.y.shape


@dataclass(frozen=True)
class Deferred:
    """act(scale x + shift) * gate, not yet formed.

    x: [N, C, H, W], channels-last. scale, shift: [V, C], a row for each of V views or one for all, or None.
    act: one of dspnet_fast.ops.deferred.ACTS. gate: [N, C] or None.
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
