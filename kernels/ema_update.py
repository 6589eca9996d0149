"""xi <- tau xi + (1 - tau) theta over a whole list of tensors in one launch.

Bound by memory: 3 x the element size per element (read xi and theta, write xi). For a list of a few hundred tensors,
launches would cost more than memory traffic, so one launch updates all. Tables on the device contain the two addresses
and the size of each tensor, and the tensor and first element of each block. 4096 elements per block of 8 warps are 16
per thread: 4 independent 16-byte loads of each operand in fp32, enough loads in flight, and small tensors waste little.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
NUM_WARPS = 8
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _step(target, online, inside, weight, FROM_TARGET: tl.constexpr):
    xi = tl.load(target, mask=inside).to(tl.float32)
    theta = tl.load(online, mask=inside).to(tl.float32)
    # Interpolating from the nearer end keeps rounding errors small, and tau = 0 and tau = 1 exact.
    stepped = xi + weight * (theta - xi) if FROM_TARGET else theta + weight * (xi - theta)
    tl.store(target, stepped.to(target.dtype.element_ty), mask=inside)


@triton.jit
def ema_update_kernel(
    tensors,  # int64 [tensors, 3]: address of the target, address of the online tensor, number of elements
    blocks,  # int64 [blocks, 2]: tensor, first element in it
    weight,  # fp32: 1 - tau if FROM_TARGET, otherwise tau
    FROM_TARGET: tl.constexpr,  # whether to interpolate from the target, with weight 1 - tau
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether all addresses are multiples of 16, which allows 16-byte loads
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    tensor = tl.load(blocks + 2 * block)
    first = tl.load(blocks + 2 * block + 1)
    target = tl.load(tensors + 3 * tensor).to(tl.pointer_type(DTYPE))
    online = tl.load(tensors + 3 * tensor + 1).to(tl.pointer_type(DTYPE))
    size = tl.load(tensors + 3 * tensor + 2)
    if ALIGNED:
        target = tl.multiple_of(target, 16)
        online = tl.multiple_of(online, 16)
    # A hint to the compiler that BLOCK divides `first`: without it, loads are not vectorised.
    offsets = tl.multiple_of(first, BLOCK) + tl.arange(0, BLOCK)
    # Only the last block of a tensor has a mask: loads with a mask of any length are not vectorised.
    if first + BLOCK <= size:
        _step(target + offsets, online + offsets, None, weight, FROM_TARGET)
    else:
        _step(target + offsets, online + offsets, offsets < size, weight, FROM_TARGET)


@functools.lru_cache(maxsize=16)
def _tables(layout: tuple[tuple[int, int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The kernel's tables, cached: addresses and sizes are the same in every step."""
    blocks = [(i, first) for i, (_, _, size) in enumerate(layout) for first in range(0, size, BLOCK)]
    return torch.tensor(layout, device=device), torch.tensor(blocks, device=device)


def ema_update(targets: Sequence[Tensor], onlines: Sequence[Tensor], tau: float) -> None:
    """dspnet_fast.ops.ema_update, for arguments that `accepts` supports."""
    layout = tuple((t.data_ptr(), o.data_ptr(), t.numel()) for t, o in zip(targets, onlines, strict=True) if t.numel())
    if not layout:
        return
    device = targets[0].device
    tensors, blocks = _tables(layout, device)
    from_target = tau > 0.5
    with torch.cuda.device_of(targets[0]):
        ema_update_kernel[(len(blocks),)](
            tensors,
            blocks,
            1 - tau if from_target else tau,
            FROM_TARGET=from_target,
            DTYPE=DTYPES[targets[0].dtype],
            ALIGNED=all(t % 16 == 0 and o % 16 == 0 for t, o, _ in layout),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )


def accepts(targets: Sequence[Tensor], onlines: Sequence[Tensor], tau: float) -> tuple[bool, str]:
    """Whether the kernel supports these arguments: (True, "") or (False, reason)."""
    if not 0 <= tau <= 1:
        return False, f"tau must lie in [0, 1], got {tau}"
    if len(targets) != len(onlines):
        return False, f"there are {len(targets)} targets and {len(onlines)} onlines"
    everything = [*targets, *onlines]
    if len({(t.dtype, t.device) for t in everything}) > 1:
        return False, "the tensors are of several dtypes or on several devices"
    if everything and everything[0].dtype not in DTYPES:
        return False, f"the tensors are {everything[0].dtype}, not fp32, fp16 or bf16"
    if not all(t.is_contiguous() for t in everything):
        return False, "not all tensors are contiguous"
    if any(t.shape != o.shape for t, o in zip(targets, onlines, strict=True)):
        return False, "a target and its online tensor have different shapes"
    return True, ""
