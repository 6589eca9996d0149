"""Time of every operator in a DSPNet training step, layer by layer, and the share of the machine's limit it reaches.

A step is that of benchmarks.step with --fast-kernels, in fp32 or bf16. Every call of an operator of `dspnet_fast.ops`
is timed, and calls with the same shapes are added up. `share` is the roofline time divided by the measured time: the
roofline time is the larger of the arithmetic at peak speed and the bytes at copy speed, where every tensor counts once.
It is empty for operators on small vectors. `lost` is the difference of the two times. Times are medians over steps.
"outside of operators" is the time of a step without this timing less that of the operators: Python, autograd, and
operations of PyTorch.

With one thread, time is processor time, which other processes disturb least; with more threads it is elapsed time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dspnet_fast.ops import registry
from dspnet_fast.ops.registry import Operator
from train import cli
from train.run.process import prepare_process

from . import machine, step

EPILOG = """\
examples:
  python -m benchmarks.layers --threads 1
      MobileNetV3-Large, all layers that lose time
  python -m benchmarks.layers --threads 1 --precision bf16 --rows 0
      kinds of operators in bf16
  python -m benchmarks.layers --network resnet --dns c64-d2222,c64-d3463 --image-size 64 --json layers.json
      another family
"""

WARM_UP = 2  # steps
LOW_SHARE = 0.6  # shares below are marked
REST = "outside of operators"


@dataclasses.dataclass(frozen=True)
class Work:
    """What a call computes.

    Attributes:
        kind: the kind of layer.
        layer: its sizes.
        flops: floating-point operations.
        bytes: bytes read and written; 0 if the operator is not bound by arithmetic or memory.
    """

    kind: str
    layer: str = ""
    flops: float = 0
    bytes: float = 0


@dataclasses.dataclass(frozen=True)
class Key:
    """Calls whose times are added up: the operator, and the work of one call."""

    operator: str
    work: Work


def _bytes(*tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _sizes(x: Tensor) -> str:
    return f"{x.shape[1]} {x.shape[2]}x{x.shape[3]}"


def _convolution(x: Tensor, y: Tensor, kernel: int, stride: int, groups: int, products: int, *tensors: Any) -> Work:
    kind = "depthwise" if groups > 1 else "pointwise" if (kernel, stride) == (1, 1) else "dense"
    taps = x.shape[1] // groups * kernel**2
    channels = f"{x.shape[1]}" if groups > 1 else f"{x.shape[1]}>{y.shape[1]}"
    strided = f" s{stride}" if stride > 1 else ""
    layer = f"{channels} {x.shape[2]}x{x.shape[3]}" + (f" k{kernel}{strided}" if kind != "pointwise" else "")
    prefixes = 1 if products == 0 else 1 + 2 * products  # a gradient's prefix is read and written
    flops, prefix = 2 * y.numel() * taps, 4 * y.shape[1] * taps
    return Work(kind, layer, flops * max(products, 1), _bytes(*tensors) + prefix * min(prefixes, 3))


def work_of(operator: str, args: Mapping[str, Any], results: Sequence[Any]) -> Work:
    """The work of a call, given the arguments by name and the results."""
    x = args.get("x")
    if operator in ("conv_moments", "conv_norm"):
        y = results[0]
        return _convolution(x, y, args["weight"].shape[2], args["stride"], args["groups"], 0, x, y)
    if operator == "conv_moments_backward":
        y, products = args["y"], args["input_gradient"] + args["weight_gradient"]
        geometry = args["weight"].shape[2], args["stride"], args["groups"], products
        return _convolution(x, y, *geometry, x, y, args["grad_y"], results[0])
    if operator in ("slim_linear", "slim_linear_backward"):
        rows, features = x.numel() // x.shape[-1], x.shape[-1]
        outputs = args.get("grad", results[0]).shape[-1]
        of_x, of_weight = args.get("input_gradient", True), args.get("weight_gradient", False)  # the forward is as of_x
        kind = "heads" if features * outputs >= 1 << 19 else "squeeze"
        flops, weight = 2 * rows * features * outputs * (of_x + of_weight), 4 * features * outputs
        return Work(kind, f"{rows}x{features}>{outputs}", flops, weight * (of_x + 2 * of_weight))
    if operator == "norm_act":
        return Work("", _sizes(x), 0, _bytes(x, args["residual"], *results))
    if operator == "norm_act_backward":
        return Work("", _sizes(x), 0, _bytes(x, args["grad"], results[0]))
    if operator == "norm_act_pool":
        return Work("", _sizes(x), 0, _bytes(x))
    return Work("")


class Recorder:
    """Times calls of all operators while it is active."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: defaultdict[Key, float] = defaultdict(float)
        self.calls: defaultdict[Key, int] = defaultdict(int)
        self._nested = False

    def timed(self, operator: Operator[Any, Any], run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, timed. Calls of operators within `run` are a part of it."""

        def call(*args: Any) -> Any:
            if self._nested:
                return run(*args)
            self._nested = True
            began = self.clock()
            results = run(*args)
            seconds = self.clock() - began
            self._nested = False
            outputs = results if isinstance(results, (tuple, list)) else (results,)
            named = dict(zip(operator.parameters, args, strict=False))
            key = Key(operator.name, work_of(operator.name, named, outputs))
            self.seconds[key] += seconds
            self.calls[key] += 1
            return results

        return call

    @contextmanager
    def active(self) -> Iterator[None]:
        """Time all calls of operators in a `with` block, in which gradients are recorded in Python."""
        operators = registry.operators.values()
        before = [(operator, operator.native, dict(operator.providers)) for operator in operators]
        for operator in operators:
            operator.native = self.timed(operator, operator.native)
            for name, provider in operator.providers.items():
                timed = dataclasses.replace(provider, run=self.timed(operator, provider.run), autograd=None)
                operator.providers[name] = timed
        registry.set_policy(registry.get_policy())  # forgets the providers it chose
        try:
            yield
        finally:
            for operator, native, providers in before:
                operator.native = native
                operator.providers.update(providers)
            registry.set_policy(registry.get_policy())


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times of all layers in a step, with those of the rest of the step as the last."""
    clock = machine.cpu_clock()
    run = step.build(step.Variant(policy="auto", precision=options.precision), options, step.images(options))
    prepare_process(torch.device("cpu"))
    for _ in range(WARM_UP):
        run.step()
    samples: defaultdict[Key, list[float]] = defaultdict(list)
    rest, total = [], []
    for _ in range(options.rounds):
        began = clock()
        run.step()
        total.append(clock() - began)
        recorder = Recorder(clock)
        with recorder.active():
            run.step()
        rest.append(total[-1] - sum(recorder.seconds.values()))
        for key, seconds in recorder.seconds.items():
            samples[key].append(seconds)
    lines = [_line(key, recorder.calls[key], statistics.median(seconds)) for key, seconds in samples.items()]
    lines.append({"operator": REST, "kind": "", "layer": "", "calls": 1, "ms": 1e3 * statistics.median(rest)})
    lines.append({"operator": "step", "kind": "", "layer": "", "calls": 1, "ms": 1e3 * statistics.median(total)})
    return lines


def _line(key: Key, calls: int, seconds: float) -> dict[str, Any]:
    work = key.work
    line = {"operator": key.operator, "kind": work.kind, "layer": work.layer, "calls": calls, "ms": 1e3 * seconds}
    if work.bytes:
        arithmetic = calls * work.flops / machine.peak_gflops() / 1e6
        memory = calls * work.bytes / machine.copy_bandwidth(_rounded(work.bytes)) / 1e6
        line |= {"limit_ms": max(arithmetic, memory), "bound": "arithmetic" if arithmetic > memory else "memory"}
    return line


def _rounded(count: float) -> int:
    """The power of two below `count`, so that few bandwidths are measured."""
    return 1 << max(round(count).bit_length() - 1, 12)


def _columns(name: str, *columns: str) -> Table:
    table = Table(name, "bound", *columns)
    for column in table.columns[2:]:
        column.justify = "right"
    return table


def _cells(ms: float, limit: float, step_ms: float) -> list[str]:
    cells = [f"{ms:.2f}", f"{ms / step_ms:.1%}"]
    if not limit:
        return [*cells, "", ""]
    return [*cells, f"{limit / ms:.0%}" + (" low" if limit / ms < LOW_SHARE else ""), f"{ms - limit:.2f}"]


def report(lines: Sequence[dict[str, Any]], rows: int, console: Console) -> None:
    """Print sums by kind, and the layers that lose most time."""
    step_ms = lines[-1]["ms"]
    kinds: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        kinds[f"{line['operator']} {line['kind']}".strip()].append(line)
    table = _columns("operator", "calls", "ms", "of step", "share", "lost ms")
    for name, group in sorted(kinds.items(), key=lambda item: -sum(line["ms"] for line in item[1])):
        ms, limit = (sum(line.get(key, 0) for line in group) for key in ("ms", "limit_ms"))
        table.add_row(name, "", str(sum(line["calls"] for line in group)), *_cells(ms, limit, step_ms))
    console.print(table)
    table = _columns("layer", "calls", "ms", "of step", "share", "lost ms")
    limited = [line for line in lines if "limit_ms" in line]
    for line in sorted(limited, key=lambda line: line["limit_ms"] - line["ms"])[:rows]:
        name = " ".join(filter(None, (line["operator"], line["kind"], line["layer"])))
        table.add_row(name, line["bound"], str(line["calls"]), *_cells(line["ms"], line["limit_ms"], step_ms))
    if rows:
        console.print(table)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layers",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    step.add_step_options(parser)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="dtype of activations [fp32]")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="measured steps [%(default)s]")
    parser.add_argument("--rows", type=int, default=40, metavar="N", help="layers in the table [%(default)s]")
    parser.add_argument("--json", metavar="FILE", help="file for the times of all layers")
    parser.add_argument("--debug", action="store_true", help="show the traceback if an error occurs")
    return parser


def main(argv: Sequence[str]) -> None:
    """Measure and print the tables."""
    options = make_parser().parse_args(argv)
    step.prepare(options)
    lines = measure(options)
    console = Console(highlight=False)
    report(lines, options.rows, console if console.is_terminal else Console(highlight=False, width=120))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(lines, file, indent=1)


if __name__ == "__main__":
    cli.run(main)
