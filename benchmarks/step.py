"""Time and memory of a whole DSPNet training step, compared with plain PyTorch.

A step starts from a uint8 batch of two views: normalisation, the target's forward pass, forward and backward pass of
every subnet, LARS and the target's update. The baseline is benchmarks/eager.py, the same step written like published
slimmable networks. Timing starts only if the first step of both gives the same losses and weight updates.

Samples of the variants are interleaved in one process. Each sample waits, for a limited time, until other processes use
less than 6 % of the machine. Times are medians; `x` is the speed-up over eager channels_last. Peak memory is that of
all live tensors during a step, including weights and optimizer state, measured in a separate process per variant.
`limit` is a lower bound of the step's time divided by the measured time; the bound is the roofline time of the
convolutions and matrix products on this machine.

The last line is machine-readable:

    step_speedup_vs_eager_channels_last=X vs_eager_default=Y peak_memory_ratio=Z

It compares fp32 with fast kernels; Z < 1 means less memory than eager channels_last.
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
from train.pretraining.trainer import Trainer
from train.run.process import prepare_process
from train.run.progress import Monitor

from . import machine, work
from .eager import EagerStep
from .memory import MIB, in_own_process, peak_of_step
from .quiet import QuietWait, interleave, relative_half_iqr

EPILOG = """\
examples:
  python -m benchmarks.step --quick
      speed-up and memory in fp32 and bf16, in less than three minutes on two cores
  python -m benchmarks.step --json step.json
      all variants except torch.compile, with more samples
  python -m benchmarks.step --network resnet --dns c32-d1111,c64-d2222 --subnets c32-d1111,c64-d2222
      another family
  python -m benchmarks.step --threads 1 --image-size 64 --batch-size 16 --rounds 5
      smaller, on one core
"""

OURS, EAGER, EAGER_DEFAULT = "ours", "eager channels_last", "eager default layout"
COPY_FOOTPRINT = 64 * MIB
LOSS_RTOL = 1e-3
UPDATE_RTOL = 0.05  # relative to the norm of the update; correct fp32 steps differed by 0.007
RUN_STEPS = 100_000  # large, so that learning rate and tau stay constant


@dataclass(frozen=True)
class Variant:
    """A variant of the step: ours with a provider policy, or the eager baseline (policy None)."""

    policy: str | None = None
    precision: str = "fp32"
    channels_last: bool = True
    compiled: bool = False
    quick: bool = True  # whether --quick includes it


VARIANTS = {
    EAGER: Variant(),
    EAGER_DEFAULT: Variant(channels_last=False),
    "eager bf16 autocast": Variant(precision="bf16", quick=False),
    "eager torch.compile": Variant(compiled=True),
    OURS: Variant(policy="auto"),
    "ours bf16": Variant(policy="auto", precision="bf16"),
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


def _names(dns: str) -> list[str]:
    return [name.strip() for name in dns.split(",") if name.strip()]


def _check(options: argparse.Namespace) -> None:
    whole = family(options.network, _names(options.dns))
    sampled = family(options.network, [whole.find(name).name for name in _names(options.subnets)])
    if sampled.full != whole.full:
        raise InputError(f"--subnets lacks {whole.full}: it is trained in every step")


def images(options: argparse.Namespace) -> Tensor:
    """Two views of random images, uint8 [2B, 3, S, S]."""
    shape = (2 * options.batch_size, 3, options.image_size, options.image_size)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


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
            compiled=variant.compiled,
        )
        return Run(lambda: eager.step(batch, subnets, lr, tau), eager.parameters)

    def step() -> dict[str, Tensor]:
        assert variant.policy is not None
        if registry.get_policy() != variant.policy:
            registry.set_policy(variant.policy)
        return trainer.train_step(batch)

    return Run(step, dict(trainer.model.online.named_parameters()))


def check_losses(ours: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    """Exit with 1 if the losses of a first step differ."""
    if ours.keys() != eager.keys():
        sys.exit(f"error: our step trains {', '.join(ours)}, the baseline {', '.join(eager)}. Nothing is timed")
    for name, loss in eager.items():
        difference = abs(ours[name].item() / loss.item() - 1)
        if not difference <= LOSS_RTOL:
            sys.exit(
                f"error: the loss of {name} is {ours[name].item():.6g}, with eager PyTorch {loss.item():.6g}: the "
                f"relative difference {difference:.1e} exceeds {LOSS_RTOL:.0e}. Nothing is timed"
            )


def check_updates(before: Mapping[str, Tensor], ours: Mapping[str, Tensor], eager: Mapping[str, Tensor]) -> None:
    """Exit with 1 if the updates of the first step differ."""
    distance = sum((ours[name] - eager[name]).double().square().sum().item() for name in before)
    length = sum((eager[name] - before[name]).double().square().sum().item() for name in before)
    difference = (distance / length) ** 0.5
    if not difference <= UPDATE_RTOL:
        sys.exit(
            f"error: our first update differs from eager PyTorch's by {difference:.1e} of its norm, more than "
            f"{UPDATE_RTOL:.0e}. Nothing is timed"
        )


@torch.no_grad()
def first_steps(ours: Run, eager: Run) -> list[work.Layer]:
    """Run and compare the first step of both; returns the layers of the step."""
    before = {name: value.clone() for name, value in eager.weights.items()}
    losses: dict[str, Tensor] = {}
    with torch.enable_grad():
        layers = work.record(lambda: losses.update(eager.step()))
        check_losses(ours.step(), losses)
    check_updates(before, ours.weights, eager.weights)
    return layers


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
    table = Table("step", *("ms", "±", "x", "images/s", "GFLOP/s", "limit", "peak MiB"))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, line in results["variants"].items():
        slower = name.startswith("ours") and line["x"] < 1
        table.add_row(
            name,
            f"{line['ms']:.0f}",
            f"{line['relative_half_iqr']:.0%}",
            f"{line['x']:.2f}" + (" slower" if slower else ""),
            f"{line['images/s']:.1f}",
            f"{line['GFLOP/s']:.0f}",
            f"{line['limit']:.0%}" if VARIANTS[name].precision == "fp32" else "",
            f"{line['peak_MiB']:.0f}",
            style="red" if slower else "bold" if name == OURS else "",
        )
    console.print(table)
    table = Table("operators of our step", "calls", "ms", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in results["profile"]:
        table.add_row(row["operator"], str(row["calls"]), f"{row['ms']:.1f}", f"{row['share']:.1%}")
    console.print(table)


def summary(variants: dict[str, Any]) -> str:
    """The machine-readable line."""
    ours, eager, default = (variants[name] for name in (OURS, EAGER, EAGER_DEFAULT))
    return (
        f"step_speedup_vs_eager_channels_last={eager['ms'] / ours['ms']:.2f} "
        f"vs_eager_default={default['ms'] / ours['ms']:.2f} "
        f"peak_memory_ratio={ours['peak_MiB'] / eager['peak_MiB']:.3f}"
    )


def _line(images: int, seconds: list[float], eager: list[float], flops: float, limit: float) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "ms": 1e3 * median,
        "relative_half_iqr": relative_half_iqr(seconds),
        "x": statistics.median(eager) / median,
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
    rounds = options.rounds or (7 if options.quick else 15)
    batch = images(options)
    monitor = Monitor("step", len(chosen) * (rounds + 2) + 3, console=progress)

    def tick(status: str) -> None:
        monitor.status(status)
        monitor.advance()

    with monitor:
        tick("compare the first steps")
        runs = {name: build(chosen[name], options, batch) for name in (EAGER, OURS)}
        layers = first_steps(runs[OURS], runs[EAGER])
        tick("measure the machine's limits")
        limit = work.roofline(layers, COPY_FOOTPRINT)
        for name, variant in chosen.items():
            tick(f"{name}: warm-up")
            if name not in runs:
                runs[name] = build(variant, options, batch)
                runs[name].step()
            runs[name].step()
        prepare_process(torch.device("cpu"))  # as train.pretrain does; the baseline profits too
        quiet = QuietWait(20, 3) if options.quick else QuietWait(200, 15)
        seconds = interleave({name: runs[name].step for name in chosen}, rounds, quiet, tick)
        tick("profile")
        operators = profile(runs[OURS].step, options.rows)
        runs.clear()
        flops = sum(layer.flops for layer in layers)
        lines = {name: _line(options.batch_size, seconds[name], seconds[EAGER], flops, limit) for name in chosen}
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
        "variant_options": {name: asdict(variant) for name, variant in chosen.items()},
        "profile": operators,
    }


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer samples; without eager bf16 and ours native")
    parser.add_argument(
        "--compile", action="store_true", help="also time the baseline with torch.compile, which takes minutes"
    )
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
    parser.add_argument("--rounds", type=int, metavar="N", help="samples per variant [15; 7 with --quick]")
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
    options.subnets = options.subnets or options.dns
    _check(options)
    if options.threads:
        torch.set_num_threads(options.threads)
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
