"""`python -m benchmarks.gpu.step`: time a whole DSPNet training step on a GPU, compared with plain PyTorch.

The baseline is benchmarks/eager.py: sliced weights, F.batch_norm for each view; channels-last, with autocast for bf16;
launched kernel by kernel, and captured as one CUDA graph. Ours is the step of train/, captured as it is in a run: plain
PyTorch (the default of a run), and the operators with all providers. Every step trains the same subnets: the smallest,
the full one and two others.

The speed-up of a variant is shown only if the losses of its first step equal the baseline's. Samples of the variants
are interleaved; a sample is several steps between two events. `limit` is the roofline time of the convolutions and
matrix products, with limits measured in the same run, divided by the measured time. Memory is the allocator's peak for
a step, including weights and private memory of graphs. `syncs` counts synchronisations of a step with the GPU; ours
must have none.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("DSPNET_BENCH_DEVICE", "cuda")

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import machine, work
from benchmarks.device import DEVICE, PRECISION, TRIALS, is_broken
from benchmarks.eager import EagerStep
from benchmarks.quiet import shuffled
from dspnet_fast.ops import registry
from dspnet_fast.subnets import sandwich
from train.config import PretrainConfig
from train.pretraining.dspnet import VIEWS
from train.pretraining.trainer import Trainer, random_batch
from train.run.device import configure_cuda

from . import measuring, page, records
from .measuring import seconds_of

MIB = 2**20
SMALL = not measuring.ON_GPU  # small networks and images: a CPU stands in for the GPU
LOSS_RTOL = {"fp32": 1e-3, "tf32": 3e-3, "bf16": 0.5 if SMALL else 3e-2}  # small batches amplify the rounding
FOOTPRINT = 2**26 if SMALL else machine.BEYOND_CACHES  # bytes of a large copy
FAMILIES = {
    "mobilenet_v3_large": "w0.50,w0.625,w0.75,w0.875,w1.00",
    "resnet": "c64-d2222,c64-d2343,c64-d3463,c96-d2222,c96-d2343,c96-d3463",
}
SMALL_FAMILIES = {"mobilenet_v3_large": "w0.25,w0.30,w0.35,w0.50", "resnet": "c8-d1111,c12-d1111,c16-d1111"}
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
    """A variant of the step.

    Attributes:
        policy: of our operators; None for the baseline.
        graphs: replay CUDA graphs.
        cudnn: choice of convolution algorithms, as --cudnn.
        views: how the baseline computes the two views, see `EagerStep`.
        compiled: torch.compile the baseline's forward passes.
    """

    policy: str | None = None
    graphs: bool = True
    cudnn: str = "default"
    views: str = "separate"
    compiled: bool = False


VARIANTS = {
    page.EAGER: Variant(graphs=False),
    page.EAGER_GRAPHS: Variant(),
    "eager stacked, graphs": Variant(views="stacked"),
    "eager, graphs, deterministic": Variant(cudnn="deterministic"),
    "eager, graphs, cudnn.benchmark": Variant(cudnn="benchmark"),
    page.COMPILED: Variant(graphs=False, compiled=True),
    page.COMPILED_GRAPHS: Variant(compiled=True),
    "ours eager": Variant("eager", cudnn="deterministic"),
    "ours eager, cudnn.benchmark": Variant("eager", cudnn="benchmark"),
    "ours": Variant("any", cudnn="deterministic"),
    "ours, launched": Variant("any", graphs=False, cudnn="deterministic"),
    "ours native": Variant("native", cudnn="deterministic"),
}
# The first variant of a group gives the losses to compare with.
BASELINE = [page.EAGER, page.EAGER_GRAPHS, "eager stacked, graphs"]
GROUPS = {
    "baseline": BASELINE,
    "short": [*BASELINE, "ours eager", "ours"],
    "all": [*BASELINE, "ours eager", "ours", "eager, graphs, deterministic", "ours, launched", "ours native"],
    "cudnn": [page.EAGER, "eager, graphs, cudnn.benchmark", "ours eager, cudnn.benchmark"],
    "compiled": [page.EAGER, page.COMPILED, page.COMPILED_GRAPHS],
}
UNTIMED = {"compiled": page.EAGER, "cudnn": page.EAGER}  # timed in another group


def set_up(variant: Variant, precision: str) -> None:
    """Set the operators' providers and the libraries' choice of algorithms for a variant."""
    policy = variant.policy or "eager"
    if registry.get_policy() != policy:
        registry.set_policy(policy)
    configure_cuda(precision == "tf32", variant.cudnn)
    torch.backends.cudnn.benchmark_limit = TRIALS


def configuration(case: Case, graphs: bool = True, cudnn: str = "deterministic", small: bool = SMALL) -> PretrainConfig:
    """Configuration of a run of a case."""
    config = PretrainConfig(
        recipe="paper",
        network=case.network,
        dns=FAMILIES[case.network],
        image_size=case.pixels,
        batch_size=case.images,
        subnets_per_step=SUBNETS_PER_STEP,
        momentum_bn="off",  # as in published slimmable networks
        precision="bf16" if case.precision == "bf16" else "fp32",
        tf32=case.precision == "tf32",
        cudnn=cudnn,
        full_only_epochs=0,
        warmup_epochs=0,
        epochs=1,
        no_cuda_graphs=not graphs,
    )
    if not small:
        return config
    return replace(
        config, dns=SMALL_FAMILIES[case.network], image_size=16, batch_size=4, hidden_features=16, out_features=8
    )


def two_views(config: PretrainConfig) -> Tensor:
    """Two views of a random batch, uint8 [2B, 3, S, S], on the device."""
    return random_batch(config, VIEWS * config.batch_size).to(DEVICE)


def build(variant: Variant, case: Case, batch: Tensor) -> Step:
    """Build a variant's step on a batch of two views; all variants start with the same weights."""
    set_up(variant, case.precision)
    config = configuration(case, variant.graphs, variant.cudnn)
    # The baseline computes its 16-bit products by autocast.
    trainer = Trainer(config if variant.policy else replace(config, precision="fp32"), 100_000, DEVICE)
    if variant.policy is not None:

        def step() -> Mapping[str, Tensor]:
            set_up(variant, case.precision)
            trainer.step = 0  # every step draws the same subnets; the learning rate is that of a long run
            return trainer.train_step(batch)

        return step
    subnets = sandwich(trainer.model.family, SUBNETS_PER_STEP, config.seed, 0)
    lr, tau = trainer.learning_rate(trainer.step), trainer.tau(trainer.step)
    eager = EagerStep(trainer.model, precision=config.precision, views=variant.views, compiled=variant.compiled)
    launched: Step = partial(eager.step, batch, subnets, lr, tau)
    run = partial(eager.graphed(batch, subnets, measuring.capture), lr, tau) if variant.graphs else launched

    def baseline() -> Mapping[str, Tensor]:
        set_up(variant, case.precision)
        return run()

    return baseline


class StepBenchmark:
    """Benchmark of one case.

    Args:
        case: the case.
        console: output.
        group: variants to time, a key of `GROUPS`.
    """

    def __init__(self, case: Case, console: Console, group: str = "all") -> None:
        self.case, self.console, self._group = case, console, group
        self._batch = two_views(configuration(case))
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
        seconds = work.roofline(layers, FOOTPRINT)
        self.limit = {"TFLOP": flops / 1e12, "GB": count / 1e9, "limit_ms": 1e3 * seconds}
        peaks = {"TFLOP/s": machine.peak_gflops() / 1e3, "copy GB/s": machine.copy_bandwidth(FOOTPRINT)}
        records.write("limit", **asdict(self.case), **self.limit, **peaks, subnets=list(self._losses))

    def prepare(self, name: str, timed: bool) -> None:
        """Build a variant, compare its first losses, and measure memory, synchronisations and a few steps.

        Args:
            name: the variant.
            timed: whether the GPU is locked, so that steps can be timed.
        """
        machine.peak_gflops()  # measured once, before memory is measured
        machine.copy_bandwidth(FOOTPRINT)
        before = measuring.reserved_memory()
        variant = VARIANTS[name]
        step = build(variant, self.case, self._batch)
        losses: dict[str, float] = {}

        def first() -> None:
            losses.update({subnet: loss.item() for subnet, loss in step().items()})

        if self._losses:
            first()
        else:
            layers = work.record(first)
            self._losses = losses
            self._find_limit(layers)
            if UNTIMED.get(self._group) == name:
                return
        difference = max(abs(losses[subnet] / loss - 1) for subnet, loss in self._losses.items())
        self.keep(name, loss_difference=difference)
        if not difference <= LOSS_RTOL[self.case.precision]:
            self.keep(name, wrong=f"its first losses differ from the baseline's by {difference:.1e}")
        for _ in range(WARM_UP):
            step()
        if timed:
            self.keep(name, ms=[1e3 * seconds_of(step) for _ in range(FIRST)], interleaved=False)
        self.keep(name, peak_MiB=(measuring.peak_of(step) - before) / MIB)
        step()
        self.keep(name, syncs=measuring.count_syncs(step))
        if self.lines[name]["syncs"] and variant.policy is not None:
            self.keep(name, first_sync=measuring.first_sync(step))
        self._steps[name] = step

    def run(self, seconds: float) -> bool:
        """Prepare all variants, then time them for about `seconds`; returns False if the GPU is broken.

        The GPU is locked from the start. Only while torch.compile compiles, which takes minutes, it is free for tests,
        and nothing is timed.
        """
        compiles = any(VARIANTS[name].compiled for name in GROUPS[self._group])
        with nullcontext() if compiles else records.exclusive_gpu():
            if not self._prepare_all(timed=not compiles):
                return False
            with records.exclusive_gpu() if compiles else nullcontext():
                return self._time_all(seconds)

    def _prepare_all(self, timed: bool) -> bool:
        names = GROUPS[self._group]
        for name in names:
            self.console.print(f"{page.title(asdict(self.case))}: {name}", highlight=False)
            if self._safely(name, partial(self.prepare, name, timed)):
                return False
        if names[0] in self._steps:
            again = f"{names[0]}{page.AGAIN}"
            self._steps[again], self.lines[again] = self._steps[names[0]], dict(self.lines[names[0]])
        return True

    def _time_all(self, seconds: float) -> bool:
        firsts: dict[str, float] = {}
        for name, step in list(self._steps.items()):
            if self._safely(name, lambda name=name, step=step: firsts.update({name: seconds_of(step)})):  # type: ignore[misc]
                return False
        steps = {name: max(1, round(SAMPLE / first)) for name, first in firsts.items()}
        total = sum(steps[name] * first for name, first in firsts.items())
        rounds = min(max(round(seconds / max(total, 1e-6)), ROUNDS[0]), ROUNDS[1])
        times: dict[str, list[float]] = {name: [] for name in self._steps}
        retries = measuring.retries()
        for number in range(rounds):
            for name in shuffled(self._steps, number):

                def sample(name: str = name) -> None:
                    step = self._steps[name]
                    times[name].append(1e3 * seconds_of(lambda: [step() for _ in range(steps[name])]) / steps[name])

                if self._safely(name, sample):
                    return False
        retries = measuring.retries() - retries
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
        epilog="environment: DSPNET_BENCH_DTYPE: bf16, tf32 or fp32 [fp32]; DSPNET_BENCH_RESULTS: file of results; "
        "DSPNET_BENCH_DEVICE=cpu: try the command with small networks on the CPU.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("network", nargs="?", choices=FAMILIES, default="mobilenet_v3_large")
    parser.add_argument(
        "images", nargs="?", type=int, default=256, help="images per batch, with two views each [%(default)s]"
    )
    parser.add_argument("pixels", nargs="?", type=int, default=128, help="height and width [%(default)s]")
    parser.add_argument("--group", choices=GROUPS, default="all", help="variants to time [%(default)s]")
    parser.add_argument("--seconds", type=float, default=8, help="approximate time of all samples [%(default)s]")
    options = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=160)
    if measuring.ON_GPU and not torch.cuda.is_available():
        parser.exit(2, "error: no CUDA device found; python -m benchmarks.step times the CPU\n")
    benchmark = StepBenchmark(Case(options.network, options.images, options.pixels), console, options.group)
    sound = benchmark.run(options.seconds)
    console.print(page.step_table({**asdict(benchmark.case), **benchmark.limit}, benchmark.lines), markup=False)
    sys.exit(not sound or bool(page.faults_of(benchmark.lines)))


if __name__ == "__main__":
    main()
