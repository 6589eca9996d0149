"""`python -m benchmarks.gpu.step`: time a whole DSPNet training step on a GPU, compared with plain PyTorch.

The baseline is benchmarks/eager.py: sliced weights, F.batch_norm, updates in loops over parameters; channels-last, with
autocast for bf16. Two slower-starting variants of the baseline are timed separately: --tried lets cuDNN choose
algorithms by timing them, --compiled compiles each subnet with torch.compile. Ours is the step of train/, launched
kernel by kernel and replayed as CUDA graphs. Every step trains the same subnets: the smallest, the full one and two
others.

The speed-up of a variant is shown only if the losses of its first step equal the baseline's. Samples of the variants
are interleaved; a sample is several steps between two events. `limit` is the roofline time of the convolutions and
matrix products, with limits measured in the same run, divided by the measured time. Memory is the allocator's peak for
a step, including weights and private memory of graphs. `syncs` counts synchronisations of a step with the GPU; ours
must have none.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("DSPNET_BENCH_DEVICE", "cuda")

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import machine, work
from benchmarks.device import DEVICE, PRECISION, between_events, configure, is_broken
from benchmarks.eager import EagerStep
from dspnet_fast.ops import registry
from dspnet_fast.subnets import sandwich
from train.config import PretrainConfig
from train.pretraining.trainer import Trainer

from . import page, records

MIB = 2**20
LOSS_RTOL = {"fp32": 1e-3, "tf32": 3e-3, "bf16": 3e-2}
FAMILIES = {
    "mobilenet_v3_large": "w0.50,w0.625,w0.75,w0.875,w1.00",
    "resnet": "c64-d2222,c64-d2343,c64-d3463,c96-d2222,c96-d2343,c96-d3463",
}
SUBNETS_PER_STEP = 4
WARM_UP = 2  # untimed steps
SAMPLE = 0.05  # approximate seconds between two events
ROUNDS = 3, 15  # smallest and largest number of samples
FIRST = 3  # steps timed at the start, so that a result exists if the later samples fail
Step = Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """Network, images per batch (with two views each), their height and width, and precision."""

    network: str
    images: int
    pixels: int
    precision: str = PRECISION


@dataclass(frozen=True)
class Variant:
    """A variant of the step: ours with a provider policy, or the eager baseline (policy None)."""

    policy: str | None = None
    graphs: bool = False
    tried: bool = False
    compiled: bool = False


VARIANTS = {
    page.EAGER: Variant(),
    "ours, graphs": Variant("any", graphs=True),
    "ours": Variant("any"),
    "ours native": Variant("native"),
}
SEPARATE = {page.TRIED: Variant(tried=True), page.COMPILED: Variant(compiled=True)}  # timed in separate processes


def set_up(variant: Variant) -> None:
    """Set the operators' providers and the libraries' choice of algorithms for a variant."""
    policy = variant.policy or "native"
    if registry.get_policy() != policy:
        registry.set_policy(policy)
    configure(ours=variant.policy is not None, tried=variant.tried)


def configuration(case: Case, graphs: bool, precision: str) -> PretrainConfig:
    """Configuration of a run of a case."""
    return PretrainConfig(
        network=case.network,
        dns=FAMILIES[case.network],
        image_size=case.pixels,
        batch_size=case.images,
        subnets_per_step=SUBNETS_PER_STEP,
        momentum_bn="off",  # as in published slimmable networks
        precision=precision,
        tf32=case.precision == "tf32",
        full_only_epochs=0,
        warmup_epochs=0,
        epochs=1,
        no_cuda_graphs=not graphs,
    )


def build(variant: Variant, case: Case, batch: Tensor) -> Step:
    """Build a variant's step on a batch of two views; all variants start with the same weights."""
    set_up(variant)
    bf16 = "bf16" if case.precision == "bf16" else "fp32"
    config = configuration(case, variant.graphs, bf16 if variant.policy else "fp32")
    trainer = Trainer(config, 100_000, DEVICE)  # many steps, so that learning rate and tau stay constant
    if variant.policy is not None:

        def step() -> Mapping[str, Tensor]:
            set_up(variant)
            trainer.step = 0  # every step draws the same subnets
            return trainer.train_step(batch)

        return step
    subnets = sandwich(trainer.model.family, SUBNETS_PER_STEP, config.seed, 0)
    lr, tau = trainer.learning_rate(trainer.step), trainer.tau(trainer.step)
    eager = EagerStep(trainer.model, precision=bf16, compiled=variant.compiled)

    def baseline() -> Mapping[str, Tensor]:
        set_up(variant)
        return eager.step(batch, subnets, lr, tau)

    return baseline


def count_syncs(step: Callable[[], object]) -> int:
    """Number of synchronisations of a call with the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def first_sync(step: Callable[[], object]) -> str:
    """Tbenchmarkback of the first synchronisation."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError:
        return traceback.format_exc()[-2000:]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "not reproduced"


def reserved_memory() -> int:
    """Bytes that the allocator reserves after freeing its cache."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def peak_of(step: Callable[[], object]) -> int:
    """Peak bytes that the allocator reserves during a step.

    Reserved, not allocated: private memory of graphs counts as free between replays.
    """
    reserved_memory()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved()


class StepBenchmark:
    """Benchmark of one case.

    Args:
        case: the case.
        console: output.
        other: variant of `SEPARATE` to time instead of `VARIANTS`.
    """

    def __init__(self, case: Case, console: Console, other: str = "") -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (2 * case.images, 3, case.pixels, case.pixels)
        self.case, self.console, self._other = case, console, other
        self._batch = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(DEVICE)
        self._steps: dict[str, Step] = {}
        self._losses: dict[str, float] = {}
        self.lines: dict[str, dict[str, Any]] = {}
        self.limit: dict[str, float] = {}

    def keep(self, name: str, **found: Any) -> None:
        """Add results of a variant, also to the file of results."""
        self.lines.setdefault(name, {}).update(found)
        records.write("step", **asdict(self.case), variant=name, **found)

    def _find_limit(self, layers: list[work.Layer]) -> None:
        flops, count = (sum(getattr(layer, kind) for layer in layers) for kind in ("flops", "bytes"))
        seconds = work.roofline(layers, machine.BEYOND_CACHES)
        self.limit = {"TFLOP": flops / 1e12, "GB": count / 1e9, "limit_ms": 1e3 * seconds}
        peaks = {"TFLOP/s": machine.peak_gflops() / 1e3, "copy GB/s": machine.copy_bandwidth(machine.BEYOND_CACHES)}
        records.write("limit", **asdict(self.case), **self.limit, **peaks, subnets=list(self._losses))

    def prepare(self, name: str) -> None:
        """Build a variant, compare its first losses, and measure memory, synchronisations and a few steps.

        If another variant is timed, the baseline provides only its losses.
        """
        machine.peak_gflops()  # measured once, before memory is measured
        machine.copy_bandwidth(machine.BEYOND_CACHES)
        before = reserved_memory()
        step = build((VARIANTS | SEPARATE)[name], self.case, self._batch)
        losses: dict[str, float] = {}

        def first() -> None:
            losses.update({subnet: loss.item() for subnet, loss in step().items()})

        if self._losses:
            first()
        else:
            layers = work.record(first)
            self._losses = losses
            self._find_limit(layers)
            if self._other:
                return
        difference = max(abs(losses[subnet] / loss - 1) for subnet, loss in self._losses.items())
        self.keep(name, loss_difference=difference)
        if not difference <= LOSS_RTOL[self.case.precision]:
            self.keep(name, wrong=f"its first losses differ from the baseline's by {difference:.1e}")
        for _ in range(WARM_UP):
            step()
        self.keep(name, peak_MiB=(peak_of(step) - before) / MIB)
        step()
        self.keep(name, ms=[1e3 * between_events(step) for _ in range(FIRST)], interleaved=False)
        self.keep(name, syncs=count_syncs(step))
        if self.lines[name]["syncs"] and (VARIANTS | SEPARATE)[name].policy == "any":
            self.keep(name, first_sync=first_sync(step))
        self._steps[name] = step

    def run(self, seconds: float) -> bool:
        """Prepare all variants, then time them for about `seconds`; returns False if the GPU is broken.

        The GPU is locked from the start, except during minutes of torch.compile.
        """
        if self._other == page.COMPILED:
            if not self._prepare_all():
                return False
            with records.exclusive_gpu():
                return self._time_all(seconds)
        with records.exclusive_gpu():
            return self._prepare_all() and self._time_all(seconds)

    def _prepare_all(self) -> bool:
        for name in [page.EAGER, self._other] if self._other else VARIANTS:
            self.console.print(f"{page.title(asdict(self.case))}: {name}")
            if self._safely(name, partial(self.prepare, name)):
                return False
        if page.EAGER in self._steps:
            self._steps[page.AGAIN] = self._steps[page.EAGER]
            self.lines[page.AGAIN] = dict(self.lines[page.EAGER])
        return True

    def _time_all(self, seconds: float) -> bool:
        firsts = {name: statistics.median(self.lines[name]["ms"]) / 1e3 for name in self._steps}
        steps = {name: max(1, round(SAMPLE / first)) for name, first in firsts.items()}
        total = sum(steps[name] * first for name, first in firsts.items())
        rounds = min(max(round(seconds / max(total, 1e-6)), ROUNDS[0]), ROUNDS[1])
        times: dict[str, list[float]] = {name: [] for name in self._steps}
        retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)
        for first in range(rounds):
            names = list(self._steps)
            for index in range(len(names)):
                name = names[(first + index) % len(names)]

                def sample(name: str = name) -> None:
                    step = self._steps[name]
                    times[name].append(1e3 * between_events(lambda: [step() for _ in range(steps[name])]) / steps[name])

                if self._safely(name, sample):
                    return False
        retries = torch.cuda.memory_stats().get("num_alloc_retries", 0) - retries
        for name in self._steps:
            self.keep(name, ms=times[name], interleaved=True, steps=steps[name], retries=retries)
        return True

    def _safely(self, name: str, run: Callable[[], None]) -> bool:
        """Run, record an error and remove the failed variant; returns whether the GPU is broken."""
        try:
            run()
        except Exception as error:  # errors of Triton and other libraries have no common base class
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            self.keep(name, error=f"{type(error).__name__}: {lines[0]}"[:300], trace=traceback.format_exc()[-4000:])
            self.console.print(f"[red]{name}: {self.lines[name]['error']}", markup=True)
            self._steps.pop(name, None)
            del error
        if is_broken():
            self.console.print("[red]the GPU is unusable for this process: the remaining variants are skipped")
            return True
        return False


def main() -> None:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="environment: DSPNET_BENCH_DTYPE: bf16, tf32 or fp32 [fp32]; DSPNET_BENCH_RESULTS: file of results.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("network", nargs="?", choices=FAMILIES, default="mobilenet_v3_large")
    parser.add_argument(
        "images", nargs="?", type=int, default=256, help="images per batch, with two views each [%(default)s]"
    )
    parser.add_argument("pixels", nargs="?", type=int, default=128, help="height and width [%(default)s]")
    parser.add_argument(
        "--compiled",
        action="store_const",
        dest="other",
        const=page.COMPILED,
        help="time the compiled baseline (minutes)",
    )
    parser.add_argument(
        "--tried",
        action="store_const",
        dest="other",
        const=page.TRIED,
        help="time the baseline with algorithms chosen by timing",
    )
    parser.add_argument("--seconds", type=float, default=8, help="approximate time of all samples [%(default)s]")
    options = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=160)
    if not torch.cuda.is_available():
        parser.exit(2, "error: no CUDA device found; python -m benchmarks.step times the CPU\n")
    benchmark = StepBenchmark(Case(options.network, options.images, options.pixels), console, options.other)
    sound = benchmark.run(options.seconds)
    console.print(page.step_table({**asdict(benchmark.case), **benchmark.limit}, benchmark.lines), markup=False)
    sys.exit(not sound or bool(page.faults_of(benchmark.lines)))


if __name__ == "__main__":
    main()
