"""The host's side of the kernels: arguments, the distribution of rows among programs, and launches."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from dspnet_fast.errors import InputError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WAVES = 8  # programs per multiprocessor: enough to occupy it, few enough to keep partial sums small

# Integer arguments that Triton must not specialise: it would compile a kernel again for values of 1 and for multiples
# of 16, hundreds of times for a family. Kernels state explicitly which sizes allow vectorised loads
# (deferred.assume_multiple_of).
SIZES = (
    "channels",
    "out_channels",
    "images",
    "positions",
    "height",
    "width",
    "out_height",
    "out_width",
    "padding",
    "stride_o",
    "size",
    "parts",
    "part_rows",
    "tiles",
    "segments",
    "programs",
    "sum_programs",
    "scale_rows",
    "residual_rows",
    "pooled_rows",
    "views",
)

Observer = Callable[[Any, tuple[Any, ...], dict[str, Any]], object]
_observer: Observer | None = None


@contextmanager
def observed(by: Observer) -> Iterator[None]:
    """Within this context, by(kernel, arguments, options) is called instead of a launch: to compile without a GPU."""
    global _observer
    _observer = by
    try:
        yield
    finally:
        _observer = None


@dataclass(frozen=True)
class Rows:
    """The distribution of a matrix's rows: `segments` segments of equal size, each processed by `parts` programs of
    `tiles` tiles of `block` rows. No program processes rows of two segments."""

    segments: int
    size: int  # rows in a segment
    block: int
    parts: int
    tiles: int

    @staticmethod
    def split(
        rows: int, segments: int, block: int, blocks: int, device: torch.device, waves: int | None = WAVES
    ) -> "Rows":
        """blocks: programs per tile of rows, one for each block of columns. waves: programs per multiprocessor; None
        for a program per tile."""
        size = check_row_count(rows) // segments
        needed = parts = triton.cdiv(size, block)
        if waves is not None:
            parts = min(needed, max(1, triton.cdiv(waves * _multiprocessors(device), segments * max(blocks, 1))))
        tiles = triton.cdiv(needed, max(parts, 1))
        return Rows(segments, size, block, triton.cdiv(needed, max(tiles, 1)), tiles)

    @property
    def programs(self) -> int:
        return self.segments * self.parts

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        """size, parts, tiles, segments, in the order of the kernels' parameters."""
        return self.size, self.parts, self.tiles, self.segments


@dataclass(frozen=True)
class Input:
    """An activation x [N, C, H, W], channels-last, and its deferred normalisation, contiguous."""

    x: Tensor
    scale: Tensor | None
    shift: Tensor | None
    act: str
    gate: Tensor | None

    @staticmethod
    def of(x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str, gate: Tensor | None) -> "Input":
        """The arguments in the layouts that kernels read."""
        scale, shift, gate = contiguous(scale, shift, gate)
        return Input(channels_last(x), scale, shift, act, gate)

    @property
    def rows(self) -> int:
        """Rows of scale and shift; 1 without them."""
        return 1 if self.scale is None else len(self.scale)

    @property
    def materialized(self) -> bool:
        """Whether x has no deferred normalisation."""
        return self.scale is None and self.act == "identity" and self.gate is None

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        """x, scale, shift, gate, in the order of the kernels' parameters; x replaces absent ones."""
        return self.x, *(self.x if tensor is None else tensor for tensor in (self.scale, self.shift, self.gate))

    @property
    def constants(self) -> dict[str, Any]:
        """ACT, DEFERRED, GATED."""
        return {"ACT": self.act, "DEFERRED": self.scale is not None, "GATED": self.gate is not None}


@dataclass(frozen=True)
class OutputGradient:
    """A convolution's output y [N, C, H, W], its mean [views, C], and the gradients of y, mean and variance.

    y and dy are channels-last, the others contiguous.
    """

    dy: Tensor
    dmean: Tensor
    dvariance: Tensor
    y: Tensor
    mean: Tensor

    @property
    def views(self) -> int:
        return len(self.mean)

    @property
    def inverse_count(self) -> float:
        """1 / (elements per channel and view); 0 without moments."""
        return self.views * self.y.shape[1] / max(self.y.numel(), 1)

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        """dy, dmean, dvariance, y, mean, in the order of the kernels' parameters."""
        return self.dy, self.dmean, self.dvariance, self.y, self.mean


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132 if device.type == "meta" else 1  # meta: compilation for a GPU of another machine; cpu: interpreted
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel: Any, grid: int, *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
    """Launch `grid` programs on the current stream of the first argument's device."""
    if _observer is not None:
        _observer(kernel, args, {"num_warps": num_warps, "num_stages": num_stages, **constants})
    elif grid:
        with torch.cuda.device_of(args[0]):
            kernel[(grid,)](*args, num_warps=num_warps, num_stages=num_stages, **constants)


def check_row_count(rows: int) -> int:
    """Return rows; raise InputError if the kernels' 32-bit row indices, including the last tile, would overflow."""
    if rows > 2**31 - 2**16:
        raise InputError(f"kernels take less than 2^31 rows (images times positions), not {rows}: split the batch")
    return rows


def channels_last(tensor: Tensor) -> Tensor:
    """The tensor in the channels-last memory format; copied only if it is in another."""
    return tensor.contiguous(memory_format=torch.channels_last)


def power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two >= size within [least, most]: the block size for `size` columns."""
    return max(least, min(most, triton.next_power_of_2(size)))


def partial_sums(count: int, rows: Rows, channels: int, like: Tensor) -> Tensor:
    """An empty buffer for `count` sums per program of a backward kernel: [count, programs, C]."""
    return like.new_empty(count, rows.programs, channels, dtype=torch.float32)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, contiguous, since kernels read scale, shift and gate without strides; None stays None."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def accepts_dtype(x: Tensor) -> tuple[bool, str]:
    """Whether the kernels support x's dtype: (True, "") or (False, reason)."""
    if x.dtype not in DTYPES:
        return False, f"it supports float32, float16 and bfloat16, not {x.dtype}"
    return True, ""
