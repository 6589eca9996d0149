"""What the operators that update flat buffers share, lars_ema_step and adamw_ema_step: checks and blocks."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

BLOCK = 1 << 19  # elements: 2 MB of each buffer, which a core's cache holds while one pass follows another


def check_buffers(op: str, flats: Mapping[str, Tensor], targets: Tensor) -> None:
    """Check that vectors have one length, dtype and device and share no memory.

    Args:
        op: name of the operator, for messages.
        flats: the vectors of equal length, `params` first.
        targets: a vector that may be shorter.
    """
    params = flats["params"]
    everything = {**flats, "targets": targets}
    for name, flat in everything.items():
        if flat.layout != torch.strided or flat.ndim != 1 or not flat.is_contiguous():
            raise RuntimeError(f"{op}: {name} must be a contiguous vector, got {tuple(flat.shape)}")
        fits = flat.dtype in (torch.float32, torch.float64) and flat.dtype == params.dtype
        if not fits or flat.device != params.device:
            raise RuntimeError(
                f"{op}: all must be float32 or all float64, on one device: {name} is {flat.dtype} on "
                f"{flat.device}, params is {params.dtype} on {params.device}"
            )
    if any(len(flat) != len(params) for flat in flats.values()) or len(targets) > len(params):
        raise RuntimeError(
            f"{op}: {' and '.join(list(flats)[1:])} must be as long as params and targets no longer, got "
            + ", ".join(f"{len(flat)} {name}" for name, flat in everything.items())
        )
    spans = sorted(
        (flat.data_ptr(), flat.data_ptr() + flat.nbytes, name) for name, flat in everything.items() if len(flat)
    )
    for (_, end, name), (start, _, other) in zip(spans, spans[1:], strict=False):
        if start < end:
            raise RuntimeError(f"{op}: {name} and {other} share memory")


def check_segments(op: str, params: Tensor, starts: Sequence[int], sizes: Sequence[int]) -> None:
    """Check that segments of params ascend and do not overlap."""
    if len(starts) != len(sizes):
        raise RuntimeError(f"{op}: {len(starts)} starts but {len(sizes)} sizes")
    end = 0
    for segment, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        if start < end or size < 0 or start + size > len(params):
            raise RuntimeError(
                f"{op}: segment {segment}, {size} elements from {start}, must start at {end} or later and end "
                f"at {len(params)} or earlier"
            )
        end = start + size


def blocks(flats: Sequence[Tensor], starts: Sequence[int]) -> Iterator[tuple[list[Tensor], slice]]:
    """Parts of vectors in which no segment is cut, to be updated one after another.

    On a CPU a part has `BLOCK` elements or one long segment, so that all passes over it but the first find it in the
    cache; elsewhere it is the whole.

    Args:
        flats: vectors, of which the last may be shorter.
        starts: first elements of segments, which do not overlap, in ascending order.

    Returns:
        Views of each vector, and the indices of the segments in them, at least one unless there are none.
    """
    length, least = len(flats[0]), BLOCK if flats[0].is_cpu else len(flats[0])
    begin = first = 0
    for index, end in enumerate([*starts[1:], length], 1):
        if end - begin >= least or end == length:
            yield [flat[begin:end] for flat in flats], slice(first, index)
            begin, first = end, index


def read_on_cpu(apply: Tensor | None) -> tuple[bool, Tensor | None]:
    """Read `apply` if it is on the CPU, where this does not wait for a device.

    Returns:
        Whether to apply, True if only the device knows; and `apply`, or None if it was read.
    """
    return (True, apply) if apply is None or not apply.is_cpu else (bool(apply), None)


def check_scalars(op: str, params: Tensor, scalars: Mapping[str, Tensor], apply: Tensor | None) -> None:
    """Check that scalars are floating-point and on the device of params, and that `apply` is bool."""
    for name, scalar in scalars.items():
        if scalar.ndim != 0 or not scalar.is_floating_point() or scalar.device != params.device:
            raise RuntimeError(
                f"{op}: {name} must be a floating-point scalar on {params.device}, got {tuple(scalar.shape)} "
                f"{scalar.dtype} on {scalar.device}"
            )
    if apply is not None and (apply.ndim != 0 or apply.dtype != torch.bool or apply.device != params.device):
        raise RuntimeError(
            f"{op}: apply must be a bool scalar on {params.device}, got {tuple(apply.shape)} {apply.dtype} on "
            f"{apply.device}"
        )
