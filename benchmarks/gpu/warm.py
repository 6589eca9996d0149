"""`python -m benchmarks.gpu.warm SHARE SHARES`: compile a share of the Triton kernels of the timed steps.

Compiling kernels one after another at their first launch takes minutes. Several processes of this command compile a
share each into Triton's cache. The kernels are found by steps on small batches whose launches are recorded instead of
executed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("DSPNET_BENCH_DEVICE", "cuda")

import torch
from torch import Tensor

from benchmarks.device import DEVICE
from dspnet_fast.ops import registry, triton
from train.pretraining.trainer import Trainer

from . import records
from .step import Case, configuration

# Most important first. The kernels do not depend on numbers of images and pixels.
CASES = [
    Case("mobilenet_v3_large", 2, 64, "bf16"),
    Case("resnet", 2, 64, "bf16"),
    Case("mobilenet_v3_large", 2, 64, "tf32"),
    Case("mobilenet_v3_large", 2, 64, "fp32"),
]
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


@contextmanager
def observed(observe: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Pass launches to `observe` instead of executing them."""
    launch: Any = triton.kernels("launch")
    launch.observer = observe
    try:
        yield
    finally:
        launch.observer = None


def _specialisation(parameter: Any, argument: Any) -> Any:
    """The properties of an argument for which Triton compiles separate kernels."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, float) or parameter.do_not_specialize:
        return type(argument)
    return argument == 1, argument % 16 == 0


def launches(cases: Sequence[Case]) -> list[Launch]:
    """Launches of the cases' steps that need separate kernels, in order."""
    found: dict[Any, Launch] = {}

    def remember(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        specialisations = tuple(map(_specialisation, kernel.params, arguments))
        found.setdefault(
            (kernel.fn.__name__, specialisations, tuple(sorted(options.items()))), (kernel, arguments, options)
        )

    registry.set_policy("triton")
    for case in cases:
        torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
        config = configuration(case, graphs=False, precision="bf16" if case.precision == "bf16" else "fp32")
        model = Trainer(config, 1, DEVICE).model
        images = torch.randn(2 * case.images, 3, case.pixels, case.pixels, device=DEVICE)
        images = images.contiguous(memory_format=torch.channels_last)
        with observed(remember):
            targets = model.targets(images, torch.zeros((), device=DEVICE))
            for subnet in model.family:
                model.loss(images, targets, subnet).backward()
    return list(found.values())


def main() -> None:
    """Compile a share of the kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("share", type=int, help="index of this share, from 0")
    parser.add_argument("shares", type=int, help="number of shares")
    options = parser.parse_args()
    began = time.monotonic()
    everything = launches(CASES)
    share = everything[options.share :: options.shares]
    for kernel, arguments, constants in share:
        kernel.warmup(*arguments, grid=(1,), **constants)
    seconds = round(time.monotonic() - began, 1)
    records.write("warm", share=options.share, kernels=len(share), of=len(everything), seconds=seconds)
    print(f"share {options.share}: {len(share)} of {len(everything)} kernels in {seconds} s")


if __name__ == "__main__":
    main()
