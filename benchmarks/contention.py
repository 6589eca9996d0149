"""Time of a training step beside a busy process, for several limits of the threads' spinning.

The threads of a step wait for each other at the end of every parallel loop, by spinning or by sleeping until they are
woken. A thread that spins is fast to continue, but beside a busy process it takes the time of the thread that it waits
for. GNU OpenMP lets threads spin 300,000 times, some milliseconds, or GOMP_SPINCOUNT times if that is in the
environment. Without it, a training `adapts`: its threads sleep while other processes are busy
(train/run/thread_waiting.py).

Each limit has a process for each formulation; steps that adapt alternate with steps that do not in the process of the
default limit, because two processes that do the same differ by up to 10 %. In every round all take a sample alone and
one beside a process that keeps one core busy, in random order, after some seconds in which a training adapts. Times are
medians of the rounds, and so are the quotients, because a machine may be slow for a minute. `ratio` is the time beside
the busy process over the time alone; with C cores in use and one busy process more, a fair scheduler gives a step
C / (C + 1) of the processor time: (C + 1) / C is the best ratio. `cost` is the time alone over that with GNU OpenMP's
default, minus 1.

The last line is machine-readable, for steps with fast kernels that adapt:

    contended_ratio=R quiet_cost=Q
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from dspnet_fast.machine import cpu_model
from dspnet_fast.verdicts import POLICIES
from train import cli
from train.run.progress import Monitor
from train.run.thread_waiting import SETTINGS

from .quiet import QuietWait

GNU_DEFAULT = 300_000
ADAPTS = None  # in place of a limit
WARM_UP = 3.0  # seconds of steps before a sample
EPILOG = """\
examples:
  python -m benchmarks.contention
      a training, and GNU OpenMP's default, in about five minutes on two cores
  python -m benchmarks.contention --spin-counts 2000,20000
      other limits besides
"""


def step_times(options: argparse.Namespace) -> None:
    """Read lines "N" or "N adapts" from stdin, run N steps, and print their seconds as JSON."""
    import torch

    from dspnet_fast.ops import registry
    from train.config import PretrainConfig
    from train.pretraining.dspnet import VIEWS
    from train.pretraining.trainer import Trainer, random_batch
    from train.run.process import prepare_process
    from train.run.thread_waiting import ThreadWaiting

    config = PretrainConfig(
        dns=options.dns,
        image_size=options.image_size,
        batch_size=options.batch_size,
        epochs=1000,
        full_only_epochs=0,
        recipe="paper",
    )
    registry.set_policy(POLICIES[options.worker])
    trainer = Trainer(config, 1000, torch.device("cpu"))
    batch = random_batch(config, VIEWS * config.batch_size)
    trainer.train_step(batch)
    prepare_process(torch.device("cpu"))
    for line in sys.stdin:
        count, *adapts = line.split()
        seconds: list[float] = []
        ready = time.perf_counter() + options.warm_up
        with ThreadWaiting() if adapts else nullcontext() as waiting:
            while len(seconds) < int(count):
                began = time.perf_counter()
                trainer.train_step(batch)
                if waiting:
                    waiting.after_step()
                if began >= ready:
                    seconds.append(time.perf_counter() - began)
        print(json.dumps(seconds), flush=True)


class Worker:
    """A process that runs training steps.

    Args:
        formulation: a key of POLICIES.
        spin_count: limit of the threads' spinning.
        arguments: command-line arguments that define the step.
    """

    def __init__(self, formulation: str, spin_count: int, arguments: Sequence[str]) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in SETTINGS}
        if spin_count != GNU_DEFAULT:  # a process with the setting does not adapt
            environment["GOMP_SPINCOUNT"] = str(spin_count)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.contention", "--worker", formulation, *arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def steps(self, count: int, adapts: bool = False) -> list[float]:
        """Seconds of `count` steps."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(count, *(["adapts"] if adapts else []), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process that runs training steps ended with code {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def busy_process() -> Iterator[None]:
    """A process that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Contention:
    """Median seconds of a step in each round, alone and beside a busy process."""

    alone: Sequence[float]
    contended: Sequence[float]

    @property
    def ratio(self) -> float:
        """Time beside a busy process over time alone."""
        return _quotient(self.contended, self.alone)

    def cost(self, default: Contention) -> float:
        """Time alone over that with the default, minus 1."""
        return _quotient(self.alone, default.alone) - 1


def _quotient(times: Sequence[float], others: Sequence[float]) -> float:
    """The median of the rounds' quotients."""
    return statistics.median(time / other for time, other in zip(times, others, strict=True))


def measure(options: argparse.Namespace, spin_counts: Sequence[int | None]) -> dict[tuple[str, int | None], Contention]:
    """Times by formulation and limit."""
    arguments = ["--dns", options.dns, *("--image-size", str(options.image_size))]
    arguments += ["--batch-size", str(options.batch_size), "--warm-up", str(options.warm_up)]
    keys = [(formulation, count) for formulation in POLICIES for count in spin_counts]
    alone: dict[tuple[str, int | None], list[float]] = {key: [] for key in keys}
    contended: dict[tuple[str, int | None], list[float]] = {key: [] for key in keys}
    quiet = QuietWait(60, 5)
    with ExitStack() as stack, Monitor("contention", len(keys) * (2 * options.rounds + 1) - len(POLICIES)) as monitor:
        workers = {}
        for formulation, count in keys:  # one after another, because starting is work
            if count is not ADAPTS:
                workers[formulation, count] = stack.enter_context(Worker(formulation, count, arguments))
                workers[formulation, count].steps(1)
                monitor.advance()

        def sample(formulation: str, count: int | None) -> float:
            seconds = workers[formulation, count or GNU_DEFAULT].steps(options.steps, count is ADAPTS)
            monitor.advance()
            return statistics.median(seconds)

        order = random.Random(0)
        for _ in range(options.rounds):
            for key in order.sample(keys, len(keys)):
                quiet.wait()
                alone[key].append(sample(*key))
            with busy_process():
                for key in order.sample(keys, len(keys)):
                    contended[key].append(sample(*key))
    return {key: Contention(alone[key], contended[key]) for key in keys}


def numbers(text: str) -> list[int]:
    """Numbers that are separated by commas."""
    return [int(number) for number in text.split(",") if number.strip()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.contention",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dns", default="w0.50,w0.75,w1.00", metavar="NAMES", help="the family [%(default)s]")
    parser.add_argument("--image-size", type=int, default=96, metavar="PX", help="height and width [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images per step [%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="samples per process [%(default)s]")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="steps per sample [%(default)s]")
    parser.add_argument(
        "--spin-counts",
        type=numbers,
        default="",
        metavar="N,N",
        help=f"limits, besides {GNU_DEFAULT}, GNU OpenMP's default [none]",
    )
    parser.add_argument(
        "--warm-up", type=float, default=WARM_UP, metavar="S", help="seconds of steps before a sample [%(default)s]"
    )
    parser.add_argument("--worker", choices=list(POLICIES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        step_times(options)
        return
    spin_counts = list(dict.fromkeys([ADAPTS, *options.spin_counts, GNU_DEFAULT]))
    results = measure(options, spin_counts)
    console = Console()
    console.print(
        f"[bold]{options.dns}[/], {options.batch_size} images of {options.image_size} px, two views, "
        f"{os.cpu_count()} cores of {cpu_model()}"
    )
    table = Table("step", "spin count", "alone ms", "cost", "beside a busy process ms", "ratio")
    for column in table.columns[1:]:
        column.justify = "right"
    cost = {key: result.cost(results[key[0], GNU_DEFAULT]) for key, result in results.items()}
    for key, result in results.items():
        formulation, count = key
        alone, contended = (f"{1e3 * statistics.median(times):.0f}" for times in (result.alone, result.contended))
        limit = "adapts" if count is ADAPTS else f"{count:,}"
        table.add_row(formulation, limit, alone, f"{cost[key]:+.1%}", contended, f"{result.ratio:.2f}")
    console.print(table)
    key = "fused", ADAPTS
    print(f"contended_ratio={results[key].ratio:.2f} quiet_cost={cost[key]:.3f}")


if __name__ == "__main__":
    cli.run(main)
