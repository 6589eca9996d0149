"""Time and memory of a family's training step, compared with separate steps of its networks, at several scales.

One of four quantities differs from the first row at a time: threads, images per step, image size, and networks in the
family. Every step is timed in a process of its own, with random images and the fast kernels, as `train.compare` does
(train/comparison/measuring.py). Loading of images is not included.

`family` is the expected time of a step in which the smallest, the full and up to two other networks are trained.
`separate` is the sum of the times of a step of every network alone, with a target of its own. `share` is their
quotient, and `counted` the same of multiply-accumulates. `memory` is the peak of the process during the family's steps
over that of its largest network alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dspnet_fast import atomic
from dspnet_fast.errors import InputError
from dspnet_fast.machine import cpu_model
from dspnet_fast.models import family
from dspnet_fast.ops import registry
from train import cli
from train.comparison.measuring import StepMeasurement, measure_step
from train.config import PretrainConfig
from train.costs.flops import expected_steps, network_costs, run_cost
from train.run.progress import Monitor

WIDTHS = {
    1: "w1.00",
    3: "w0.50,w0.75,w1.00",
    5: "w0.50,w0.625,w0.75,w0.875,w1.00",
    11: "w0.50,w0.55,w0.60,w0.65,w0.70,w0.75,w0.80,w0.85,w0.90,w0.95,w1.00",
}
EPILOG = """\
examples:
  python -m benchmarks.scaling
      MobileNetV3 in about ten minutes on two cores
  python -m benchmarks.scaling --image-sizes 96 --batch-sizes 32 --families 5 --threads 1,2,4,8
      more threads
"""


@dataclass(frozen=True)
class Scale:
    """A row of the table."""

    threads: int
    batch_size: int
    image_size: int
    networks: int

    def config(self, dns: str) -> PretrainConfig:
        """The configuration of a step."""
        return PretrainConfig(
            recipe="paper",
            dns=dns,
            image_size=self.image_size,
            batch_size=self.batch_size,
            epochs=1,
            warmup_epochs=0,
            full_only_epochs=0,
        )


@dataclass(frozen=True)
class Result:
    """What was measured at a scale: seconds, and quotients as described at the top of this file."""

    scale: Scale
    family: float
    separate: float
    counted: float
    memory: float | None

    @property
    def share(self) -> float:
        """The family's time over that of the separate steps."""
        return self.family / self.separate


def scales(options: argparse.Namespace) -> list[Scale]:
    """The first values of all options, then every other value of one of them."""
    first = Scale(options.threads[0], options.batch_sizes[0], options.image_sizes[0], options.families[0])
    varied = {
        "threads": options.threads,
        "batch_size": options.batch_sizes,
        "image_size": options.image_sizes,
        "networks": options.families,
    }
    return [first, *(replace(first, **{name: value}) for name, values in varied.items() for value in values[1:])]


def expected_seconds(config: PretrainConfig, found: StepMeasurement) -> float:
    """The expected time of a step, whose subnets are drawn."""
    trained = expected_steps(config, 1)
    return found.target + sum(trained[name] * found.online[name] for name in trained) + found.optimizer


def measure(options: argparse.Namespace) -> Iterator[Result]:
    """Measure all scales; progress is shown on stderr."""
    registry.set_policy("auto")
    chosen = scales(options)

    @cache
    def step(scale: Scale, dns: str) -> StepMeasurement:
        torch.set_num_threads(scale.threads)
        monitor.status(f"{dns}, {scale.batch_size} images of {scale.image_size} px, {scale.threads} threads")
        return measure_step(scale.config(dns), options.steps)

    with Monitor("scaling", sum(1 + scale.networks for scale in chosen), console=Console(stderr=True)) as monitor:
        for scale in chosen:
            config = scale.config(WIDTHS[scale.networks])
            alone = replace(scale, networks=1)  # the same step in families of all sizes
            separate = counted = 0.0
            names = family(config.network, config.names()).names
            for name in names:
                found = step(alone, name)
                monitor.advance()
                separate += expected_seconds(scale.config(name), found)
                counted += macs(scale.config(name))
            whole = step(alone, config.dns)
            monitor.advance()
            peaks = whole.peak_memory, step(alone, names[-1]).peak_memory
            memory = None if None in peaks else peaks[0] / peaks[1]  # type: ignore[operator]
            yield Result(scale, expected_seconds(config, whole), separate, macs(config) / counted, memory)


def macs(config: PretrainConfig) -> float:
    """Expected multiply-accumulates of a step."""
    return sum(run_cost(config, 1, network_costs(config)).parts().values())


def report(results: Sequence[Result], console: Console) -> None:
    """Print the table."""
    console.print(f"mobilenet_v3_large, two views, {cpu_model()}, torch {torch.__version__}, fp32")
    table = Table("threads", "images", "px", "networks", "family ms", "separate ms", "share", "counted", "memory")
    for column in table.columns:
        column.justify = "right"
    for result in results:
        scale = result.scale
        table.add_row(
            *(str(value) for value in asdict(scale).values()),
            f"{1e3 * result.family:.0f}",
            f"{1e3 * result.separate:.0f}",
            f"{result.share:.2f}",
            f"{result.counted:.2f}",
            "" if result.memory is None else f"{result.memory:.2f}",
        )
    console.print(table)


def numbers(text: str) -> list[int]:
    """Positive numbers that are separated by commas."""
    found = [int(number) for number in text.split(",")]
    if min(found) < 1:
        raise ValueError(text)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    threads = torch.get_num_threads()
    default = ",".join(str(count) for count in sorted({threads, max(1, threads // 2)}, reverse=True))
    for option, values, unit in (
        ("--threads", default, "threads"),
        ("--batch-sizes", "32,8,128,256", "images per step"),
        ("--image-sizes", "96,32,64,224", "heights and widths in pixels"),
        ("--families", "5,1,3,11", f"numbers of networks, some of {', '.join(map(str, WIDTHS))}"),
    ):
        parser.add_argument(option, type=numbers, default=values, metavar="N,N", help=f"{unit} [%(default)s]")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="timed steps of each network [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for all results")
    options = parser.parse_args(arguments)
    if not {*options.families} <= WIDTHS.keys():
        raise InputError(f"--families must be some of {', '.join(map(str, WIDTHS))}")
    results = list(measure(options))
    report(results, Console(highlight=False))
    if options.json:
        atomic.write_text(options.json, json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
