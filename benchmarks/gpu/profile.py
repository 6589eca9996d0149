"""`python -m benchmarks.gpu.profile`: time every kernel of one launched training step, by operator and shapes.

Each operator that PyTorch dispatches is a range of the profiler, and a kernel belongs to the operator that launched it.
Bytes are those of the operator's arguments and results, each tensor once, so bytes per second is a lower
bound of the traffic for operators with several kernels. The time of operators without kernels, such as views, is not
shown. On the CPU, the stand-in of a GPU, an operator counts as one kernel.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("DSPNET_BENCH_DEVICE", "cuda")

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.device import DEVICE
from train.pretraining.trainer import Trainer

from . import measuring, page, records
from .step import FAMILIES, Case, Variant, configuration, set_up, two_views

ROWS = 200  # recorded kernels, which take nearly all of the time
PREFIX = "operator #"  # of the names of ranges


class _Ranges(TorchDispatchMode):
    """Makes a range of the profiler for every operator. calls: name, shapes and bytes of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number = len(self.calls)
        self.calls.append(("", "", 0))
        with record_function(f"{PREFIX}{number}"):
            result = function(*args, **(kwargs or {}))
        given = list(_tensors((args, kwargs or {})))
        count = sum({tensor.data_ptr(): tensor.nbytes for tensor in (*given, *_tensors(result))}.values())
        shapes = " ".join("x".join(map(str, tensor.shape)) or "scalar" for tensor in given[:3])
        self.calls[number] = (str(function).removesuffix(".default"), shapes, count)
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _kernels(event: Any) -> Iterator[tuple[str, float]]:
    """Names and microseconds of the kernels of a range."""
    for kernel in event.kernels:
        yield kernel.name, kernel.duration
    for child in event.cpu_children:
        yield from _kernels(child)


def rows(events: Iterable[Any], calls: list[tuple[str, str, int]], on_gpu: bool = True) -> list[dict[str, Any]]:
    """One row per operator, shapes and kernel, the longest total time first.

    Args:
        events: of torch.profiler.
        calls: name, shapes and bytes of each range.
        on_gpu: whether events have kernels.
    """
    totals: dict[tuple[str, str, str, int], list[float]] = defaultdict(list)
    for event in events:
        if event.name.startswith(PREFIX):
            operator, shapes, count = calls[int(event.name.removeprefix(PREFIX))]
            found = _kernels(event) if on_gpu else [(operator, event.cpu_time_total)]
            for kernel, microseconds in found:
                totals[operator, shapes, kernel, count].append(microseconds)
    return sorted(
        (
            {
                "operator": operator,
                "shapes": shapes,
                "kernel": kernel[:120],
                "count": len(times),
                "ms": sum(times) / 1e3,
                "GB/s": count * len(times) / max(sum(times), 1e-3) / 1e3,
            }
            for (operator, shapes, kernel, count), times in totals.items()
        ),
        key=lambda row: -row["ms"],
    )


def profiled(step: Callable[[], object]) -> list[dict[str, Any]]:
    """The rows of one call, after one to warm up."""
    step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if measuring.ON_GPU else [])]
    ranges = _Ranges()
    with profile(activities=activities) as profiler:
        with ranges:
            step()
        if measuring.ON_GPU:
            torch.cuda.synchronize()
    return rows(profiler.events(), ranges.calls, measuring.ON_GPU)


def main() -> None:
    """Profile the steps of both formulations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?", choices=FAMILIES, default="mobilenet_v3_large")
    parser.add_argument("images", nargs="?", type=int, default=256, help="images per batch [%(default)s]")
    parser.add_argument("pixels", nargs="?", type=int, default=128, help="height and width [%(default)s]")
    parser.add_argument("--policies", default="any,eager", help="policies of the operators [%(default)s]")
    options = parser.parse_args()
    case = Case(options.network, options.images, options.pixels)
    for policy in options.policies.split(","):
        variant = Variant(policy, graphs=False, cudnn="deterministic")
        set_up(variant, case.precision)
        config = configuration(case, graphs=False)
        trainer, batch = Trainer(config, 100_000, DEVICE), two_views(config)

        def step(trainer: Trainer = trainer, batch: Tensor = batch) -> None:
            trainer.step = 0
            trainer.train_step(batch)

        found = profiled(step)
        for row in found[:ROWS]:
            records.write("kernel", policy=policy, **vars(case), **row)
        print(page.kernel_table(found))


if __name__ == "__main__":
    main()
