"""Shared tests of the operators that update flat buffers, lars_ema_step and adamw_ema_step.

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


def check_tau(step: Callable[..., None], arguments: dict) -> None:
    """Targets are kept with tau = 1, and equal the parameters with tau = 0."""
    kept = arguments["targets"].clone()
    step(**arguments | {"tau": torch.tensor(1.0)})
    assert torch.equal(arguments["targets"], kept)
    step(**arguments | {"tau": torch.tensor(0.0)})
    assert torch.equal(arguments["targets"], arguments["params"][: len(kept)])


def check_threads(step: Callable[..., None], arguments: dict, buffers: Sequence[str]) -> None:
    """Results are bitwise equal for any number of threads."""
    results = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        results.append(copy(arguments))
        step(**results[-1])
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in buffers)


def check_slices(
    step: Callable[..., None], arguments: dict, expected: Callable[[dict], dict[str, Tensor]], vectors: Sequence[str]
) -> None:
    """Vectors may be unaligned slices of one buffer, whose other elements are unchanged."""
    memory, offset = torch.full((100_000,), 5.0), 3
    for name in vectors:
        size = len(arguments[name])
        arguments[name] = memory[offset : offset + size].copy_(arguments[name])
        offset += size
    want = expected(arguments)
    step(**arguments)
    for name in vectors:
        torch.testing.assert_close(arguments[name].double(), want[name], rtol=1e-5, atol=1e-6)
    assert memory[:3].eq(5).all() and memory[offset:].eq(5).all()


def check_build(run_python: Callable[..., str], capability: str, module: str) -> None:
    """Run `check` of a test module with the compiled library's build for a CPU capability, in a new process."""
    program = f"""
import torch
from dspnet_fast.ops import registry
from tests.ops.flat_steps import DTYPES, LAYOUTS
from tests.ops.{module} import check, make
registry.set_policy("cpp")
torch.set_num_threads(3)
torch.manual_seed(0)
for dtype in DTYPES:
    for layout in LAYOUTS:
        for tau in (0.0, 0.3, 0.996, 1.0):
            check(layout, make(layout, dtype) | {{"tau": torch.tensor(tau)}})
print(torch.ops.dspnet_cpp.cpu_capability())
"""
    assert run_python("-c", program, ATEN_CPU_CAPABILITY=capability.lower()).strip() == capability
