"""What a training step must do at least: the arithmetic and the memory traffic of its convolutions and products."""

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
            # The output is read beside its gradient: batch normalisation's gradient is a function of both.
            self._add(len(wanted) * 2 * grad.numel() * weight[0].numel(), grad, grad, x, weight, *wanted)
        elif func in (aten.mm.default, aten.addmm.default):
            left, right = args[-2:]
            self._add(2 * result.numel() * left.shape[1], left, right, result)
        return result

    def _add(self, flops: float, *tensors: Tensor) -> None:
        self.layers.append(Layer(flops, sum(tensor.numel() * tensor.element_size() for tensor in tensors)))


def record(step: Callable[[], object]) -> list[Layer]:
    """The layers that an eager fp32 step runs through, forward and backward.

    Each is charged with its operands, once, and nothing else is charged: what lies between two convolutions
    (normalisation, activation, gates, residuals) could be done as they read and write.
    """
    recorder = _Recorder()
    with recorder:
        step()
    return recorder.layers


def roofline(layers: list[Layer], footprint: int) -> float:
    """The least seconds for all of them on this machine, each as long as the slower of arithmetic and memory takes."""
    return sum(roofline_seconds(layer.flops, layer.bytes, footprint) for layer in layers)
