"""What the tests of the operators that update flat buffers share, lars_ema_step and adamw_ema_step.

A step is a function of the operator's arguments up to tau, which are the dictionary `arguments`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)

# (size, adapted) of every tensor in the buffers, and the length of the targets, which need not end with a tensor.
LAYOUTS = {
    "odd sizes": ([(7, True), (769, True), (5, False), (5125, True), (1, False), (4096, True), (33, False)], 8000),
    "one element each": ([(1, True), (1, False), (1, True), (1, True)], 3),
    "split between threads": ([(100, False), (70_001, True), (3000, False), (40_000, True), (17, True)], 90_000),
    "empty segments": ([(0, True), (9, True), (0, True), (0, False), (9, False), (0, True)], 18),
    "only adapted": ([(100, True)], 100),
    "none adapted": ([(100, False)], 0),
    "nothing": ([], 0),
}
FLAT = 10_036  # elements of "odd sizes"


def make(
    layout: str, dtype: torch.dtype, scales: dict[str, float], scalars: dict[str, float], device: str = "cpu"
) -> dict:
    """Random buffers, whose standard deviations are `scales`, targets and segments of a layout, and scalars."""
    parts, with_target = LAYOUTS[layout]
    starts, sizes, total = [], [], 0
    for size, adapted in parts:
        if adapted:
            starts.append(total)
            sizes.append(size)
        total += size
    buffers = {name: scale * torch.randn(total, dtype=dtype) for name, scale in scales.items()}
    tensors = {**buffers, "targets": torch.randn(with_target, dtype=dtype)}
    tensors |= {name: torch.tensor(value, dtype=torch.float64) for name, value in scalars.items()}
    return {**{name: tensor.to(device) for name, tensor in tensors.items()}, "starts": starts, "sizes": sizes}


def copy(arguments: dict) -> dict:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def check_apply(step: Callable[..., None], arguments: dict, buffers: Sequence[str]) -> None:
    """With `apply` true the step is bitwise the ordinary one; with false only the gradients change, even if NaN."""
    device = arguments["params"].device
    applied, want = copy(arguments), copy(arguments)
    step(**want)
    step(**applied, apply=torch.tensor(True, device=device))
    assert all(torch.equal(applied[name], want[name]) for name in buffers)
    kept = copy(arguments)
    kept["grads"][::3] = float("nan")
    step(**kept, apply=torch.tensor(False, device=device))
    assert not kept["grads"].count_nonzero()
    assert all(torch.equal(kept[name], arguments[name]) for name in buffers if name != "grads")
