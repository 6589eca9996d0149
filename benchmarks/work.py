"""Minimum work of a training step: arithmetic and memory traffic of its convolutions and matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .machine import roofline_seconds


@dataclass(frozen=True)
class Layer:
    """One convolution or matrix product, in one direction."""

    flops: float
    bytes: float


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Layer] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func is aten.convolution.default:
            x, weight = args[:2]
            self._add(2 * result.numel() * weight[0].numel(), x, weight, result)
        elif func is aten.convolution_backward.default:
            grad, x, weight = args[:3]
            wanted = [tensor for tensor in result[:2] if tensor is not None]
            # The output is read too: the gradient of the following batch norm depends on it.
            self._add(len(wanted) * 2 * grad.numel() * weight[0].numel(), grad, grad, x, weight, *wanted)
        elif func in (aten.mm.default, aten.addmm.default):
            left, right = args[-2:]
            self._add(2 * result.numel() * left.shape[1], left, right, result)
        return result

    def _add(self, flops: float, *tensors: Tensor) -> None:
        self.layers.append(Layer(flops, sum(tensor.numel() * tensor.element_size() for tensor in tensors)))


def record(step: Callable[[], object]) -> list[Layer]:
    """Record the layers of an eager fp32 step, forward and backward.

    Each counts its operands once. Normalisation, activations, gates and residuals count nothing, because they could be
    fused into the loads and stores of the convolutions.
    """
    recorder = _Recorder()
    with recorder:
        step()
    return recorder.layers


def roofline(layers: list[Layer], footprint: int) -> float:
    """Lower bound of their time in seconds: for each layer the larger of arithmetic and memory time."""
    return sum(roofline_seconds(layer.flops, layer.bytes, footprint) for layer in layers)
