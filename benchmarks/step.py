"""Time and memory of a whole DSPNet training step, compared with the strongest plain PyTorch.

A step starts from a uint8 batch of two views: normalisation, the target's forward pass, forward and backward pass of
every subnet, LARS and the target's update. The baseline is benchmarks/eager.py, the same step in plain PyTorch without
avoidable copies, in several variants: two layouts, two precisions, the two views stacked or one after another, and with
--compile torch.compile. Timing starts only if the first step of every variant gives the same losses and weight
updates; torch.compile's is left out, with the reason, if it gives others.

Samples of the variants are interleaved in one process. Each sample waits, for a limited time, until other processes use
less than 6 % of the machine. Times are medians. `x` is the speed-up over the fastest plain fp32 step in channels-last,
`x same` over the fastest plain channels-last step of the same precision. Peak memory is that of all live tensors during
a step, including weights and optimizer state, measured in a separate process per variant. `limit` is a lower bound of
the step's time divided by the measured time; the bound is the roofline time of the convolutions and matrix products on
this machine.

The last line is machine-readable:

    step_speedup_vs_eager_channels_last=X vs_eager_default=Y peak_memory_ratio=Z bf16_speedup=B no_flag_speedup=N

X and Y compare fp32 with fast kernels to the fastest plain fp32 step of either layout, and Z its memory to the smallest
of plain fp32 in channels-last (Z < 1 is less memory). B compares bf16 with fast kernels to the fastest plain step of
any precision and layout. N compares fp32 without --fast-kernels to the fastest plain fp32 step in channels-last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # hides the profiler's messages about missing GPUs
# By default oneDNN keeps 1,024 compiled primitives, enough for one variant. Variants in one process would evict each
# other's, and compiling them again makes plain PyTorch's steps 10 to 30 % slower than they are in a run.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dspnet_fast.errors import InputError
from dspnet_fast.machine import cpu_model
from dspnet_fast.models import family
from dspnet_fast.ops import registry
from train import cli
from train.config import PretrainConfig
from train.pretraining.dspnet import VIEWS
from train.pretraining.trainer import Trainer, random_batch
from train.run.process import prepare_process
from train.run.progress import Monitor

from . import machine, work
from .eager import EagerStep
from .memory import MIB, in_own_process, peak_of_step
from .quiet import QuietWait, interleave, relative_half_iqr

EPILOG = """\
examples:
  python -m benchmarks.step --quick
      speed-up and memory in fp32 and bf16, in less than four minutes on two cores
  python -m benchmarks.step --compile --json step.json
      all variants, with more samples
  python -m benchmarks.step --network resnet --dns c32-d1111,c64-d2222 --subnets c32-d1111,c64-d2222
      another family
  python -m benchmarks.step --threads 1 --image-size 64 --batch-size 16 --rounds 5
      smaller, on one core
"""

EAGER, OURS, OURS_BF16 = "eager channels_last", "ours", "ours bf16"
NO_FLAG = "ours without --fast-kernels"
COPY_FOOTPRINT = 64 * MIB
LOSS_RTOL = {"fp32": 1e-3, "bf16": 1e-2}
# Relative to the norm of the update; correct steps differed by 0.007 and 0.85.
UPDATE_RTOL = {"fp32": 0.05, "bf16": 1.0}
SLOWER = 0.97  # speed-ups below are marked
RUN_STEPS = 100_000  # large, so that learning rate and tau stay constant


@dataclass(frozen=True)
class Variant:
    """A variant of the step: ours with a provider policy, or the eager baseline (policy None)."""

    policy: str | None = None
    precision: str = "fp32"
    channels_last: bool = True
    views: str = "separate"
    compiled: bool = False
    quick: bool = True  # whether --quick includes it


VARIANTS = {
    EAGER: Variant(),
    "eager channels_last, views stacked": Variant(views="stacked"),
    "eager channels_last, view by view": Variant(views="sequential"),
    "eager default layout": Variant(channels_last=False),
    "eager default layout, views stacked": Variant(channels_last=False, views="stacked", quick=False),
    "eager bf16 autocast": Variant(precision="bf16", quick=False),
    "eager bf16 autocast, views stacked": Variant(precision="bf16", views="stacked"),
    "eager torch.compile": Variant(compiled=True),
    OURS: Variant(policy="auto"),
    OURS_BF16: Variant(policy="auto", precision="bf16"),
    NO_FLAG: Variant(policy="eager"),
    f"{NO_FLAG}, bf16": Variant(policy="eager", precision="bf16"),
    "ours native": Variant(policy="native", quick=False),
}


@dataclass(frozen=True)
class Run:
    """The step of a variant, which returns losses by subnet, and the weights that it trains."""

    step: Callable[[], dict[str, Tensor]]
    weights: Mapping[str, Tensor]


def configuration(options: argparse.Namespace, precision: str = "fp32") -> PretrainConfig:
    """Configuration of a run in which every step trains all subnets of the family."""
    subnets = _names(options.subnets)
    return PretrainConfig(
        recipe="paper",
        network=options.network,
        dns=",".join(subnets),
        stem=options.stem,
        image_size=options.image_size,
        batch_size=options.batch_size,
        subnets_per_step=max(2, len(subnets)),
        momentum_bn="off",  # as in published slimmable networks
        precision=precision,
        full_only_epochs=0,
        warmup_epochs=0,
        epochs=1,
    )


def prepare(options: argparse.Namespace) -> None:
    """Complete and check the options of a step, and set the number of threads."""
    options.subnets = options.subnets or options.dns
    _check(options)
    if options.threads:
        torch.set_num_threads(options.threads)


def _names(dns: str) -> list[str]:
    return [name.strip() for name in dns.split(",") if name.strip()]


def _check(options: argparse.Namespace) -> None:
    whole = family(options.network, _names(options.dns))
    sampled = family(options.network, [whole.find(name).name for name in _names(options.subnets)])
    if sampled.full != whole.full:
        raise InputError(f"--subnets lacks {whole.full}: it is trained in every step")


def images(options: argparse.Namespace) -> Tensor:
    """Two views of random images, uint8 [2B, 3, S, S]."""
    return random_batch(configuration(options), VIEWS * options.batch_size)


def build(variant: Variant, options: argparse.Namespace, batch: Tensor) -> Run:
    """Build a variant; all variants have copies of the same initial weights."""
    precision = variant.precision if variant.policy else "fp32"
    trainer = Trainer(configuration(options, precision), RUN_STEPS, torch.device("cpu"))
    if variant.policy is None:
        subnets, lr, tau = list(trainer.model.family), trainer.learning_rate(trainer.step), trainer.tau(trainer.step)
        eager = EagerStep(
            trainer.model,
            channels_last=variant.channels_last,
            precision=variant.precision,
            views=variant.views,
            compiled=variant.compiled,
        )
        return Run(lambda: eager.step(batch, subnets, lr, tau), eager.parameters)

    def step() -> dict[str, Tensor]:
        assert variant.policy is not None
        if registry.get_policy() != variant.policy:
            registry.set_policy(variant.policy)
        return trainer.train_step(batch)

    return Run(step, dict(trainer.model.online.named_parameters()))


@dataclass(frozen=True)
class FirstStep:
    """Losses by subnet, weight updates by name, and duration of a variant's first step."""

    losses: dict[str, float]
    updates: dict[str, Tensor]
    seconds: float


def first_step(run: Run) -> FirstStep:
    """Run the first step of a variant."""
    before = {name: value.detach().clone() for name, value in run.weights.items()}
    began = time.perf_counter()
    losses = {name: loss.item() for name, loss in run.step().items()}
    seconds = time.perf_counter() - began
    return FirstStep(losses, {name: value.detach() - before[name] for name, value in run.weights.items()}, seconds)


def problem(precision: str, first: FirstStep, baseline: FirstStep) -> str | None:
    """How losses or updates of a variant's first step differ from the baseline's; None if they agree."""
    if first.losses.keys() != baseline.losses.keys():
        return f"it trains {', '.join(first.losses)}, {EAGER} {', '.join(baseline.losses)}"
    for subnet, loss in baseline.losses.items():
        difference = abs(first.losses[subnet] / loss - 1)
        if not difference <= LOSS_RTOL[precision]:
            return (
                f"the loss of {subnet} is {first.losses[subnet]:.6g}, that of {EAGER} {loss:.6g}: the relative "
                f"difference {difference:.1e} exceeds {LOSS_RTOL[precision]:.0e}"
            )
    difference = update_difference(first, baseline)
    if not difference <= UPDATE_RTOL[precision]:
        return (
            f"the first update differs from that of {EAGER} by {difference:.1e} of its norm, more than "
            f"{UPDATE_RTOL[precision]:.0e}"
        )
    return None


def update_difference(first: FirstStep, baseline: FirstStep) -> float:
    """Norm of the difference of two updates, relative to the norm of the second."""
    distance = sum((first.updates[name] - u).double().square().sum().item() for name, u in baseline.updates.items())
    return (distance / sum(u.double().square().sum().item() for u in baseline.updates.values())) ** 0.5


def profile(step: Callable[[], object], rows: int) -> list[dict[str, Any]]:
    """Profile a step: the operators with the largest self time, then the sum of all others."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    table = [{"operator": e.key, "calls": e.count, "ms": e.self_cpu_time_total / 1e3} for e in events]
    total = sum(row["ms"] for row in table)
    others = {
        "operator": f"{len(table[rows:])} others",
        "calls": sum(row["calls"] for row in table[rows:]),
        "ms": sum(row["ms"] for row in table[rows:]),
    }
    return [{**row, "share": row["ms"] / total} for row in [*table[:rows], others]]


def report(results: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    limits, options = results["machine"], results["options"]
    console.print(
        f"[bold]{options['network']}[/], {options['subnets']}, {options['batch_size']} images of "
        f"{options['image_size']} px, two views, {limits['threads']} threads of {limits['processor']}, "
        f"torch {limits['torch']}"
    )
    console.print(
        f"this machine: {limits['GFLOP/s']:.0f} GFLOP/s fp32, copy {limits['copy GB/s']:.1f} GB/s (read and written, "
        f"{COPY_FOOTPRINT // MIB} MiB). One step: {results['GFLOP']:.1f} GFLOP, {results['GB']:.2f} GB, at least "
        f"{results['limit_ms']:.0f} ms"
    )
    compiles = any("compile_s" in line for line in results["variants"].values())
    table = Table("step", *("ms", "±", "x", "x same", "images/s", "GFLOP/s", "limit", "peak MiB"))
    if compiles:
        table.add_column("compile s")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, line in results["variants"].items():
        slower = VARIANTS[name].policy is not None and line["x_same_precision"] < SLOWER
        table.add_row(
            name,
            f"{line['ms']:.0f}",
            f"{line['relative_half_iqr']:.0%}",
            f"{line['x']:.2f}",
            f"{line['x_same_precision']:.2f}" + (" slower" if slower else ""),
            f"{line['images/s']:.1f}",
            f"{line['GFLOP/s']:.0f}",
            f"{line['limit']:.0%}" if VARIANTS[name].precision == "fp32" else "",
            f"{line['peak_MiB']:.0f}",
            *([f"{line['compile_s']:.0f}" if "compile_s" in line else ""] if compiles else []),
            style="red" if slower else "bold" if name == OURS else "",
        )
    console.print(table)
    for name, reason in results["wrong"].items():
        console.print(f"{name} is left out: {reason}")
    table = Table("operators of our step", "calls", "ms", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in results["profile"]:
        table.add_row(row["operator"], str(row["calls"]), f"{row['ms']:.1f}", f"{row['share']:.1%}")
    console.print(table)


def smallest_plain(lines: Mapping[str, Any], key: str, **options: Any) -> float:
    """The smallest value of the baseline's variants that have these options."""
    return min(
        line[key]
        for name, line in lines.items()
        if (variant := VARIANTS[name]).policy is None
        and all(getattr(variant, option) == value for option, value in options.items())
    )


def summary(lines: Mapping[str, Any]) -> str:
    """The machine-readable line."""
    eager = smallest_plain(lines, "ms", precision="fp32", channels_last=True)
    default = smallest_plain(lines, "ms", precision="fp32", channels_last=False)
    memory = smallest_plain(lines, "peak_MiB", precision="fp32", channels_last=True)
    return (
        f"step_speedup_vs_eager_channels_last={eager / lines[OURS]['ms']:.2f} "
        f"vs_eager_default={default / lines[OURS]['ms']:.2f} "
        f"peak_memory_ratio={lines[OURS]['peak_MiB'] / memory:.3f} "
        f"bf16_speedup={smallest_plain(lines, 'ms') / lines[OURS_BF16]['ms']:.2f} "
        f"no_flag_speedup={eager / lines[NO_FLAG]['ms']:.2f}"
    )


def _line(images: int, seconds: list[float], flops: float, limit: float) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "ms": 1e3 * median,
        "relative_half_iqr": relative_half_iqr(seconds),
        "images/s": images / median,
        "GFLOP/s": flops / median / 1e9,
        "limit": limit / median,
        "seconds": seconds,
    }


def measure(options: argparse.Namespace, argv: Sequence[str], progress: Console) -> dict[str, Any]:
    """Run all measurements; `progress` shows a progress bar."""
    chosen = {
        name: variant
        for name, variant in VARIANTS.items()
        if (options.compile if variant.compiled else variant.quick or not options.quick)
    }
    rounds = options.rounds or (5 if options.quick else 15)
    batch = images(options)
    monitor = Monitor("step", len(chosen) * (rounds + 2) + 2, console=progress)

    def tick(status: str) -> None:
        monitor.status(status)
        monitor.advance()

    with monitor:
        runs: dict[str, Run] = {}
        baseline: list[FirstStep] = []
        compile_seconds: dict[str, float] = {}
        wrong: dict[str, str] = {}
        for name, variant in chosen.items():
            tick(f"{name}: first step")
            runs[name] = build(variant, options, batch)
            if name == EAGER:
                layers = work.record(lambda: baseline.append(first_step(runs[EAGER])))
                continue
            first = first_step(runs[name])
            if different := problem(variant.precision, first, *baseline):
                if not variant.compiled:
                    sys.exit(f"error: {name}: {different}. Nothing is timed")
                wrong[name] = different  # compilers have faults, and the other variants can be timed without it
                del runs[name]
            elif variant.compiled:
                compile_seconds[name] = first.seconds
        baseline.clear()
        chosen = {name: variant for name, variant in chosen.items() if name in runs}
        tick("measure the machine's limits")
        limit = work.roofline(layers, COPY_FOOTPRINT)
        prepare_process(torch.device("cpu"))  # as train.pretrain does; the baseline profits too
        quiet = QuietWait(20, 3) if options.quick else QuietWait(200, 15)
        seconds = interleave({name: runs[name].step for name in chosen}, rounds, quiet, tick)
        tick("profile")
        operators = profile(runs[OURS].step, options.rows)
        runs.clear()
        flops = sum(layer.flops for layer in layers)
        lines = {name: _line(options.batch_size, seconds[name], flops, limit) for name in chosen}
        for name, line in lines.items():
            for key, precision in (("x", "fp32"), ("x_same_precision", chosen[name].precision)):
                line[key] = smallest_plain(lines, "ms", precision=precision, channels_last=True) / line["ms"]
            if name in compile_seconds:
                line["compile_s"] = compile_seconds[name]
        for name in chosen:
            tick(f"{name}: memory")
            lines[name] |= in_own_process("benchmarks.step", [*argv, "--memory-of", name])
    return {
        "options": {k: v for k, v in vars(options).items() if k in ("network", "subnets", "stem")}
        | {"image_size": options.image_size, "batch_size": options.batch_size},
        "machine": {
            "processor": cpu_model(),
            "system": platform.platform(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "GFLOP/s": machine.peak_gflops(),
            "copy GB/s": machine.copy_bandwidth(COPY_FOOTPRINT),
        },
        "kernels": registry.serving(),
        "GFLOP": flops / 1e9,
        "GB": sum(layer.bytes for layer in layers) / 1e9,
        "limit_ms": 1e3 * limit,
        "variants": lines,
        "wrong": wrong,
        "variant_options": {name: asdict(variant) for name, variant in chosen.items()},
        "profile": operators,
    }


def add_step_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `configuration` and `images` read."""
    parser.add_argument("--network", default="mobilenet_v3_large", metavar="NAME", help="architecture [%(default)s]")
    parser.add_argument("--dns", default="w0.50,w0.625,w0.75,w1.00", metavar="NAMES", help="the family [%(default)s]")
    parser.add_argument(
        "--subnets", metavar="NAMES", help="subnets that every step trains, with the full one [all of --dns]"
    )
    parser.add_argument(
        "--stem", default="standard", metavar="STEM", help="standard, or small for small images [%(default)s]"
    )
    parser.add_argument(
        "--image-size", type=int, default=96, metavar="N", help="height and width in pixels [%(default)s]"
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="images per batch, with two views each [%(default)s]"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="PyTorch threads [one per core]")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer samples, and fewer variants")
    parser.add_argument(
        "--compile", action="store_true", help="also time the baseline under torch.compile, which takes minutes"
    )
    add_step_options(parser)
    parser.add_argument("--rounds", type=int, metavar="N", help="samples per variant [15; 5 with --quick]")
    parser.add_argument("--rows", type=int, default=15, metavar="N", help="rows of the profile [%(default)s]")
    parser.add_argument("--json", metavar="FILE", help="file for all measurements, including samples")
    parser.add_argument("--debug", action="store_true", help="show the traceback if an error occurs")
    parser.add_argument(
        "--memory-of", choices=VARIANTS, help=argparse.SUPPRESS
    )  # internal: measure the memory of a variant in this process
    return parser


def main(argv: Sequence[str]) -> None:
    """Measure and print the results."""
    options = make_parser().parse_args(argv)
    prepare(options)
    if options.memory_of:
        variant, batch = VARIANTS[options.memory_of], images(options)
        print(json.dumps({"peak_MiB": peak_of_step(lambda: build(variant, options, batch).step) / MIB}))
        return
    results = measure(options, argv, Console(stderr=True, highlight=False))
    results["summary"] = summary(results["variants"])
    console = Console(highlight=False)
    report(results, console if console.is_terminal else Console(highlight=False, width=120))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)
    print(results["summary"])


if __name__ == "__main__":
    cli.run(main)
