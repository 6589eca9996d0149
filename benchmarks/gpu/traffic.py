"""Predicted memory traffic of the Triton kernels of MobileNetV3's blocks, from their launches on meta tensors.

    python -m benchmarks.gpu.traffic --pixels 128 --images 2048

Needs no GPU. DRAM bytes count every activation once per launch, L2 bytes each time that a program loads it, and
partial sums and weights as often as they are stored or loaded. The predicted time is the larger of DRAM and L2 time:
a lower bound that ignores arithmetic, latency and launches.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspnet_fast.models.mobilenet_v3 import STAGES
from dspnet_fast.ops import triton
from dspnet_fast.subnets import make_divisible

VIEWS = 2
# Bytes per second: DRAM measured (H200) or as large copies reach (A100); L2 assumed.
GPUS = {"H200": (4.3e12, 5.5e12), "A100": (1.5e12, 4.0e12)}


@dataclass(frozen=True)
class Traffic:
    """Bytes that one launch moves."""

    dram: float
    l2: float

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.dram + other.dram, self.l2 + other.l2)

    def seconds(self, gpu: str) -> float:
        """The lower bound of the launch's time."""
        dram, l2 = GPUS[gpu]
        return max(self.dram / dram, self.l2 / l2)


def launches(call: Callable[[], object]) -> list[tuple[str, dict[str, Any]]]:
    """Name and arguments of every kernel that a call launches with meta tensors."""
    from dspnet_fast.kernels import launch

    recorded: list[tuple[str, dict[str, Any]]] = []

    def record(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        names = (parameter.name for parameter in kernel.params)
        recorded.append((kernel.fn.__name__, dict(zip(names, args, strict=False)) | options))

    with launch.observed(record):
        call()
    return recorded


def traffic(name: str, a: dict[str, Any]) -> Traffic:
    """The bytes of a launch with these arguments."""
    activations = {id(value): value for value in a.values() if isinstance(value, Tensor) and value.ndim == 4}
    once = float(sum(map(_bytes, activations.values())))
    sums = sum(_bytes(a[key]) for key in ("partial", "dweight", "dtaps") if key in a and a[key].ndim < 4)
    if "pointwise" not in name:
        return Traffic(once + sums, once + sums)
    x, y, weight = a["x"], a["y"], a.get("weight")
    channels, out_channels, rows = x.shape[1], y.shape[1], y.numel() // y.shape[1]
    in_blocks = math.ceil(channels / a["BLOCK_I"])
    out_blocks = math.ceil(out_channels / a["BLOCK_O"])
    per_tile = 0 if weight is None else out_channels * channels * weight.element_size()
    weights = per_tile * math.ceil(rows / a["BLOCK_M"])
    if "wide" in name or a.get("WEIGHT"):
        loaded = once + weights
    elif "weight_gradient" in name:
        loaded = in_blocks * 2 * _bytes(y) + out_blocks * _bytes(x)
    elif "input_gradient" in name:
        loaded = in_blocks * 2 * _bytes(y) + 2 * _bytes(x)
    else:
        loaded = out_blocks * _bytes(x) + _bytes(y)
    return Traffic(once + sums, loaded + sums)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def total(call: Callable[[], object]) -> Traffic:
    """The traffic of all kernels that a call launches."""
    return sum((traffic(*launch) for launch in launches(call)), Traffic(0, 0))


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A meta tensor, channels-last if 4D."""
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor.to(memory_format=torch.channels_last) if len(shape) == 4 else tensor


@dataclass(frozen=True)
class Layer:
    """A convolution of MobileNetV3: name, input and output channels, size of the input, kernel, stride, gate."""

    name: str
    channels: int
    out_channels: int
    size: int
    kernel: int = 1
    stride: int = 1
    gated: bool = False
    pooled: bool = False

    def calls(self, images: int) -> tuple[Callable[[], object], Callable[[], object]]:
        """Forward and backward, in bf16."""
        kernels = triton.kernels("conv_moments")
        depthwise = self.kernel > 1
        out = (self.size + self.stride - 1) // self.stride
        x, y = (
            empty(images, channels, size, size, dtype=torch.bfloat16)
            for channels, size in ((self.channels, self.size), (self.out_channels, out))
        )
        weight = empty(self.out_channels, 1 if depthwise else self.channels, self.kernel, self.kernel)
        rows, moments = empty(VIEWS, self.channels), empty(VIEWS, self.out_channels)
        given = x, rows, rows, "hardswish", empty(images, self.channels) if self.gated else None, weight
        geometry = self.stride, self.kernel // 2, self.channels if depthwise else 1
        pooled = (empty(images, self.out_channels), moments, moments) if self.pooled else (None, None, None)
        return (
            lambda: kernels.conv_moments(*given, self.out_channels, *geometry, VIEWS),
            lambda: kernels.conv_moments_backward(
                empty(*y.shape, dtype=y.dtype), moments, moments, *given, weight, y, moments, *geometry, True, True,
                *pooled, "hardswish",
            ),
        )  # fmt: skip


def layers(pixels: int) -> Iterator[Layer]:
    """The convolutions of the inverted residuals at width 1.00, each distinct one once."""
    channels, size = STAGES[0].channels, pixels // 2
    for stage, row in enumerate(STAGES[1:], 1):
        for index, block in enumerate(row.blocks):
            expanded, out, name = make_divisible(channels * block.expand), size // block.stride, f"{stage}.{index}"
            yield Layer(f"{name} expand", channels, expanded, size)
            yield Layer(f"{name} depthwise", expanded, expanded, size, block.kernel, block.stride, pooled=block.squeeze)
            yield Layer(f"{name} project", expanded, row.channels, out, gated=block.squeeze)
            channels, size = row.channels, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=128, help="height and width of the images")
    parser.add_argument("--images", type=int, default=2048, help="images of both views together")
    options = parser.parse_args()
    names = " | ".join(f"{gpu} ms (x DRAM)" for gpu in GPUS)
    print(f"| layer | pass | DRAM MB | L2 MB | {names} |\n|---|---|---:|---:|{'---:|' * len(GPUS)}")
    for layer in layers(options.pixels):
        for direction, call in zip(("forward", "backward"), layer.calls(options.images), strict=True):
            moved = total(call)
            times = []
            for gpu, (dram, _) in GPUS.items():
                seconds = moved.seconds(gpu)
                times.append(f"{1e3 * seconds:.3f} ({seconds * dram / moved.dram:.2f})")
            shape = f"{layer.name} {layer.channels}>{layer.out_channels} {layer.size}x{layer.size}"
            print(f"| {shape} | {direction} | {moved.dram / 1e6:.0f} | {moved.l2 / 1e6:.0f} | {' | '.join(times)} |")


if __name__ == "__main__":
    main()
