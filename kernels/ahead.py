"""Compile kernels before their first launch, in a pool of processes, into Triton's cache. Needs no GPU.

    python -m dspnet_fast.kernels.ahead CAPABILITY PROCESSES

reads a `Launch` per line from standard input, in JSON, and prints a line per kernel: {"kernel", "seconds"} of CPU time,
with "error" if the compilation failed. CAPABILITY is the compute capability of the GPU, such as 90.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

INT32_END = 2**31


@dataclass(frozen=True)
class Launch:
    """The properties of a launch that Triton compiles a kernel for. Equal launches share a compiled kernel.

    Attributes:
        kernel: module and name, separated by a colon.
        arguments: of a tensor dtype and alignment, such as "float32" or "float32 unaligned"; of a number a
            representative that Triton specialises alike.
        options: the kernel's constants and the compiler's options, by name.
    """

    kernel: str
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Launch:
        """The properties of an observed launch (launch.observed)."""
        properties = tuple(map(_properties, kernel.params, arguments))
        return cls(f"{kernel.fn.__module__}:{kernel.fn.__name__}", properties, tuple(sorted(options.items())))

    def json(self) -> str:
        """A line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Launch:
        """The launch of a line of JSON."""
        fields = json.loads(line)
        return cls(fields["kernel"], tuple(fields["arguments"]), tuple(map(tuple, fields["options"])))

    def jit_function(self) -> Any:
        """The kernel."""
        module, name = self.kernel.split(":")
        return getattr(importlib.import_module(module), name)

    def compile(self) -> Any:
        """Compile for the target of `set_target`, or load from Triton's cache. Returns Triton's compiled kernel."""
        return self.jit_function().warmup(*map(argument, self.arguments), grid=(1,), **dict(self.options))


def _properties(parameter: Any, argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return str(argument.dtype).removeprefix("torch.") + ("" if argument.data_ptr() % 16 == 0 else " unaligned")
    if isinstance(argument, float):
        return 0.5
    beyond = 0 if argument < INT32_END else 2 * INT32_END
    if parameter.do_not_specialize:
        return beyond + 2
    return 1 if argument == 1 else beyond + (16 if argument % 16 == 0 else 3)


def argument(properties: Any) -> Any:
    """An argument with these properties."""
    if not isinstance(properties, str):
        return properties
    dtype, _, unaligned = properties.partition(" ")
    return torch.empty(2, dtype=getattr(torch, dtype), device="meta")[bool(unaligned) :]


class _Driver:
    """Stands for the driver of a GPU of another machine; also keeps the process from creating a CUDA context."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def set_target(capability: int) -> None:
    """Compile kernels of this process for a compute capability, such as 90; afterwards none can be launched."""
    driver.set_active(_Driver(capability))


def _timed(launch: Launch) -> dict[str, Any]:
    began, result = os.times(), {"kernel": launch.kernel.split(":")[1]}
    try:
        launch.compile()
    except Exception as error:  # Triton's errors have no common base class
        result["error"] = f"{type(error).__name__}: {error}"[:300]
    return result | {"seconds": round(sum(os.times()[:4]) - sum(began[:4]), 2)}  # of this process and of ptxas


def main() -> None:
    """Compile the launches of standard input."""
    capability, processes = map(int, sys.argv[1:])
    launches = [Launch.from_json(line) for line in sys.stdin]
    set_target(capability)
    for launch in launches:
        launch.jit_function()  # imported once, before the pool forks
    with ProcessPoolExecutor(processes, get_context("fork")) as pool:
        for done in as_completed([pool.submit(_timed, launch) for launch in launches]):
            print(json.dumps(done.result()), flush=True)


if __name__ == "__main__":
    main()
