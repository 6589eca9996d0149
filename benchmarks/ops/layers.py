"""Layers that operators are timed on: two views of images of 96 px, in two widths of a family."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.device import DEVICE, DTYPE, ON_GPU
from benchmarks.eager import hardswish, prefix
from dspnet_fast.ops import registry
from dspnet_fast.ops.registry import Operator

IMAGES, VIEWS = 2048 if ON_GPU else 64, 2  # images of both views together
DIRECTIONS = ("forward", "forward + backward")  # without gradient, as in the target; with gradient

ACTS: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda x: x, "relu": F.relu_, "hardswish": hardswish}


@dataclass(frozen=True)
class Conv:
    """A convolution of [IMAGES, channels, size, size] with a prefix of a weight of `full` = [O, I] channels.

    Attributes:
        channels: input channels.
        size: height and width of the input.
        out_channels: output channels.
        full: channels of the full weight.
        kernel: kernel size.
        stride: stride.
        act: deferred activation of the input; None: the input has no deferred normalisation, as at a block's start.
        gated: whether the input has a deferred squeeze-and-excite gate.
    """

    channels: int
    size: int
    out_channels: int
    full: tuple[int, int]
    kernel: int = 1
    stride: int = 1
    act: str | None = None
    gated: bool = False

    @property
    def groups(self) -> int:
        """1, or the number of channels for a depthwise convolution."""
        return self.channels if self.full[1] == 1 else 1

    @property
    def out_size(self) -> int:
        """Height and width of the output."""
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def flops(self) -> float:
        """Floating-point operations of the forward pass."""
        taps = self.kernel**2 * self.channels / self.groups
        return 2 * IMAGES * self.out_channels * self.out_size**2 * taps

    @property
    def prefix(self) -> int:
        """Bytes of the prefix of the weight."""
        return 4 * self.out_channels * self.channels // self.groups * self.kernel**2


def _pointwise(name: str, size: int, ends: Sequence[int], halves: Sequence[int], *deferred) -> dict[str, Conv]:
    """Pointwise convolutions of width 1.00 and 0.50, given input and output channels of each."""
    return {
        f"{name} {channels}>{out} {size}x{size} {width}": Conv(channels, size, out, (ends[1], ends[0]), 1, 1, *deferred)
        for width, (channels, out) in (("w1.00", ends), ("w0.50", halves))
    }


def _depthwise(name: str, size: int, channels: int, half: int, kernel: int, stride: int, act: str) -> dict[str, Conv]:
    """Depthwise convolutions of width 1.00 and 0.50, given the channels of each."""
    strided = f" s{stride}" if stride > 1 else ""
    return {
        f"{name} {used} {size}x{size} k{kernel}{strided} {width}": Conv(
            used, size, used, (channels, 1), kernel, stride, act
        )
        for width, used in (("w1.00", channels), ("w0.50", half))
    }


MOBILENET = {
    "stem 3>16 96x96 k3 s2": Conv(3, 96, 16, (16, 3), 3, 2),
    **_pointwise("1.0 expand", 48, (16, 64), (8, 32)),
    **_pointwise("1.1 project", 24, (72, 24), (48, 16), "relu"),
    **_pointwise("3.0 project", 6, (240, 80), (144, 40), "hardswish"),
    **_pointwise("4.1 project, gated", 6, (672, 112), (336, 56), "hardswish", True),
    **_pointwise("5.1 expand", 3, (160, 960), (80, 480)),
    **_pointwise("5.1 project, gated", 3, (960, 160), (480, 80), "hardswish", True),
    **_depthwise("1.0 depthwise", 48, 64, 32, 3, 2, "relu"),
    **_depthwise("1.1 depthwise", 24, 72, 48, 3, 1, "relu"),
    **_depthwise("2.1 depthwise", 12, 120, 72, 5, 1, "relu"),
    **_depthwise("4.1 depthwise", 6, 672, 336, 3, 1, "hardswish"),
    **_depthwise("5.1 depthwise", 3, 960, 480, 5, 1, "hardswish"),
}
RESNET = {
    "ResNet-18 64>64 24x24 k3": Conv(64, 24, 64, (64, 64), 3, 1, "relu"),
    "ResNet-18 256>256 6x6 k3": Conv(256, 6, 256, (256, 256), 3, 1, "relu"),
    "ResNet-18 512>512 2x2 k3": Conv(512, 2, 512, (512, 512), 3, 1, "relu"),
    "ResNet-18 64>128 24x24 s2": Conv(64, 24, 128, (128, 64), 1, 2),
}


def variants(operator: Operator) -> list[str]:
    """Names of all variants: the alternative first, then ours."""
    compiled = ["compile"] if os.environ.get("DSPNET_BENCH_COMPILE") == "1" else []
    return ["eager", *compiled, *ours(operator)]


def ours(operator: Operator) -> list[str]:
    """The native implementation, then the operator's providers for this device."""
    return ["native", *(name for name in registry.PRIORITY[DEVICE.type] if name in operator.providers)]


def random(*shape: int) -> Tensor:
    """An activation that requires a gradient, channels-last if 4D."""
    return weight(*shape).detach().to(DTYPE).requires_grad_()


def weight(*shape: int) -> Tensor:
    """An fp32 tensor that requires a gradient, channels-last if 4D."""
    x = torch.randn(shape, device=DEVICE)
    return (x.to(memory_format=torch.channels_last) if x.ndim == 4 else x).requires_grad_()


def own_prefix(full: Tensor, layer: Conv) -> Tensor:
    """A layer's prefix of a weight, in the dtype that plain PyTorch multiplies in fastest; requires a gradient.

    It is copied before the timing, as benchmarks/eager.py copies it once per step.
    """
    used = prefix(full, (layer.out_channels, layer.channels // layer.groups)).detach()
    dtype = torch.float32 if layer.groups > 1 and not ON_GPU else DTYPE
    return used.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def rows(channels: int) -> tuple[Tensor, Tensor]:
    """Scale and shift of both views."""
    scale, shift = torch.rand(VIEWS, channels, device=DEVICE), torch.randn(VIEWS, channels, device=DEVICE)
    return (1 + scale).requires_grad_(), shift.requires_grad_()


def affine(channels: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a batch normalisation."""
    gamma, beta = torch.rand(channels, device=DEVICE), torch.randn(channels, device=DEVICE)
    return (1 + gamma).requires_grad_(), beta.requires_grad_()


def halves(x: Tensor) -> list[Tensor]:
    """The two views as separate tensors."""
    return [view.detach().clone().requires_grad_(x.requires_grad) for view in x.chunk(VIEWS)]


def nbytes(*tensors: Tensor | None) -> int:
    """Sum of the tensors' bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def runner(
    variant: str,
    direction: str,
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor],
) -> Callable[[], object]:
    """The timed call: function(*inputs), and with DIRECTIONS[1] the gradients of all inputs that require one."""
    if variant == "compile":
        function = torch.compile(function, dynamic=False)
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]

    def forward() -> object:
        with torch.no_grad():
            return function(*inputs)

    def both() -> object:
        return torch.autograd.grad(function(*inputs), wanted, grads, allow_unused=True)

    return forward if direction == DIRECTIONS[0] else both
