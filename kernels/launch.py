"""Where kernels meet tensors: how rows are shared out among programs, and the launch itself."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from dspnet_fast.errors import InputError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WAVES = 8  # programs per multiprocessor: enough to fill it several times over, few enough to keep partial sums small

# Arguments of kernels that say how much there is of something. Triton would compile a kernel anew where one of them is
# 1 or a multiple of 16, hundreds of times for a family; what widens loads, kernels say by themselves
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
    "scale_rows",
    "residual_rows",
    "views",
)

# Called instead of the launch if set, with (kernel, arguments, options): to compile for a GPU that is not there.
observer: Callable[[Any, tuple[Any, ...], dict[str, Any]], None] | None = None


@dataclass(frozen=True)
class Rows:
    """The rows of a matrix: `segments` parts of equal size that are never mixed, each worked on by `parts` programs of
    `tiles` tiles of `block` rows."""

    segments: int
    size: int  # rows in a segment
    block: int
    parts: int
    tiles: int

    @staticmethod
    def share(rows: int, segments: int, block: int, others: int, device: torch.device) -> "Rows":
        """others: programs that work on the same rows, such as those on other columns."""
        size = check_row_count(rows) // segments
        needed = triton.cdiv(size, block)
        parts = min(needed, max(1, triton.cdiv(WAVES * _multiprocessors(device), segments * max(others, 1))))
        tiles = triton.cdiv(needed, max(parts, 1))
        return Rows(segments, size, block, triton.cdiv(needed, max(tiles, 1)), tiles)

    @property
    def programs(self) -> int:
        return self.segments * self.parts

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        """size, parts, tiles, segments, as kernels take them."""
        return self.size, self.parts, self.tiles, self.segments


@dataclass(frozen=True)
class Input:
    """An activation x [N, C, H, W], channels-last, and what it is deferred, all contiguous."""

    x: Tensor
    scale: Tensor | None
    shift: Tensor | None
    act: str
    gate: Tensor | None

    @property
    def rows(self) -> int:
        """Of scale and shift; 1 where there are none."""
        return 1 if self.scale is None else len(self.scale)

    @property
    def materialized(self) -> bool:
        """Whether nothing is deferred."""
        return self.scale is None and self.act == "identity" and self.gate is None

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        """x, scale, shift, gate, as kernels take them: where one is absent, something that they do not read."""
        return self.x, *(self.x if tensor is None else tensor for tensor in (self.scale, self.shift, self.gate))

    @property
    def constants(self) -> dict[str, Any]:
        """ACT, DEFERRED, GATED."""
        return {"ACT": self.act, "DEFERRED": self.scale is not None, "GATED": self.gate is not None}


@dataclass(frozen=True)
class OutputGradient:
    """What reaches a convolution's output y [N, C, H, W], channels-last, and its moments [views, C]; all contiguous."""

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
        """One over the elements per channel and view; 0 without moments."""
        return self.views * self.y.shape[1] / max(self.y.numel(), 1)

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        """dy, dmean, dvariance, y, mean, as kernels take them."""
        return self.dy, self.dmean, self.dvariance, self.y, self.mean


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132 if device.type == "meta" else 1  # interpreted, or compiled for another machine
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel: Any, grid: int, *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
    """Runs `grid` programs on the current stream of the device of the first argument, a tensor."""
    if observer is not None:
        observer(kernel, args, {"num_warps": num_warps, "num_stages": num_stages, **constants})
    elif grid:
        with torch.cuda.device_of(args[0]):
            kernel[(grid,)](*args, num_warps=num_warps, num_stages=num_stages, **constants)


def check_row_count(rows: int) -> int:
    """The number of rows, which kernels count in 32 bits (of elements, in 64), with room for the last tile."""
    if rows > 2**31 - 2**16:
        raise InputError(f"kernels take less than 2^31 rows (images times positions), not {rows}: split the batch")
    return rows


def channels_last(tensor: Tensor) -> Tensor:
    """The tensor with its channels adjacent in memory; itself if they are."""
    return tensor.contiguous(memory_format=torch.channels_last)


def power_of_two(size: int, least: int, most: int) -> int:
    """The block size for `size` columns."""
    return max(least, min(most, triton.next_power_of_2(size)))


def partial_sums(kinds: int, rows: Rows, channels: int, like: Tensor) -> Tensor:
    """Room for what the programs of a backward sum up, for scale and shift and more: [kinds, programs, C]."""
    return like.new_empty(kinds, rows.programs, channels, dtype=torch.float32)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors that are there, contiguous: scale, shift and gate are read without strides."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def takes(x: Tensor) -> tuple[bool, str]:
    """Whether kernels on activations take x's dtype."""
    if x.dtype not in DTYPES:
        return False, f"it serves float32, float16 and bfloat16, not {x.dtype}"
    return True, ""
