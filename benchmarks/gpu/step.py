"""`python -m benchmarks.gpu.step`: a whole DSPNet training step on a GPU, ours against plain PyTorch.

The comparison is benchmarks/eager.py: sliced weights, F.batch_norm, updates parameter by parameter; channels-last, for
bf16 by autocast, as published slimmable code trains. In runs of their own, since they take long to begin, it has its
convolutions' algorithms chosen by trial (--tried), or is compiled by torch.compile, each subnet by itself (--compiled).
Ours is train/'s own step: launched kernel by kernel, and replayed as CUDA graphs. The same step is taken again and
again: smallest, full and two more of a family.

A variant's losses in its first step must be the comparison's, or nothing is said of what it gains. Variants take turns;
a sample is of several steps between two events. `limit` is the share of the time that the GPU, as measured in the same
run, would need for the convolutions and matrix products alone if each were bound by nothing but its own arithmetic or
by reading and writing its operands once. Memory is what torch's allocator must have for a step, weights and the private
memory of graphs included. `syncs` counts how often a step makes the host wait, which ours must not.
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
WARM_UP = 2
SAMPLE = 0.05  # seconds of steps between two events, about
ROUNDS = 3, 15  # at least, at most
FIRST = 3  # steps that are timed at once, so that there is a figure whatever becomes of the rest
Step = Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """Images per batch, of two views each, and their height and width."""

    network: str
    images: int
    pixels: int
    precision: str = PRECISION


@dataclass(frozen=True)
class Variant:
    """A way to compute the step: ours under a policy, or the comparison, with no policy."""

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
SINGLE_PROCESS = {page.TRIED: Variant(tried=True), page.COMPILED: Variant(compiled=True)}  # each beside the comparison


def set_up(variant: Variant) -> None:
    """What the variant finds: operators' providers, and how libraries choose algorithms."""
    policy = variant.policy or "native"
    if registry.get_policy() != policy:
        registry.set_policy(policy)
    configure(ours=variant.policy is not None, tried=variant.tried)


def configuration(case: Case, graphs: bool, precision: str) -> PretrainConfig:
    """A run of that case."""
    return PretrainConfig(
        network=case.network,
        dns=FAMILIES[case.network],
        image_size=case.pixels,
        batch_size=case.images,
        subnets_per_step=SUBNETS_PER_STEP,
        momentum_bn="off",  # published slimmable code has none
        precision=precision,
        full_only_epochs=0,
        warmup_epochs=0,
        epochs=1,
        no_cuda_graphs=not graphs,
    )


def build(variant: Variant, case: Case, batch: Tensor) -> Step:
    """The variant's step on a batch of two views; all start with the same weights."""
    set_up(variant)
    bf16 = "bf16" if case.precision == "bf16" else "fp32"
    config = configuration(case, variant.graphs, bf16 if variant.policy else "fp32")
    trainer = Trainer(config, 100_000, DEVICE)  # so long that learning rate and tau stay what they are
    if variant.policy is not None:

        def step() -> Mapping[str, Tensor]:
            set_up(variant)
            trainer.step = 0  # other steps draw other subnets
            return trainer.train_step(batch)

        return step
    subnets = sandwich(trainer.model.family, SUBNETS_PER_STEP, config.seed, 0)
    lr, tau = trainer.learning_rate(trainer.step), trainer.tau(trainer.step)
    eager = EagerStep(trainer.model, precision=bf16, compiled=variant.compiled)

    def comparison() -> Mapping[str, Tensor]:
        set_up(variant)
        return eager.step(batch, subnets, lr, tau)

    return comparison


def syncs_of(step: Callable[[], object]) -> int:
    """How often a call makes the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def where_it_waits(step: Callable[[], object]) -> str:
    """The traceback of the first such call."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError:
        return traceback.format_exc()[-2000:]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "not when asked again"


def held() -> int:
    """Bytes that the allocator has and needs."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def peak_of(step: Callable[[], object]) -> int:
    """Bytes that the allocator takes for a step when it begins with what lives all the time.

    Not what is allocated: the intermediates of a graph lie in private memory, which counts as free between replays.
    """
    held()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved()


class Race:
    """The variants of one case. other: of SINGLE_PROCESS, instead of them, beside the comparison."""

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
        """Add to what is known of a variant, here and in the file of results."""
        self.lines.setdefault(name, {}).update(found)
        records.write("step", **asdict(self.case), variant=name, **found)

    def _find_limit(self, layers: list[work.Layer]) -> None:
        flops, count = (sum(getattr(layer, kind) for layer in layers) for kind in ("flops", "bytes"))
        seconds = work.roofline(layers, machine.BEYOND_CACHES)
        self.limit = {"TFLOP": flops / 1e12, "GB": count / 1e9, "limit_ms": 1e3 * seconds}
        peaks = {"TFLOP/s": machine.peak_gflops() / 1e3, "copy GB/s": machine.copy_bandwidth(machine.BEYOND_CACHES)}
        records.write("limit", **asdict(self.case), **self.limit, **peaks, subnets=list(self._losses))

    def enter(self, name: str) -> None:
        """Build a variant, compare its first losses, and measure what needs no turns.

        Beside another one the comparison gives its losses and nothing else.
        """
        machine.peak_gflops()  # measured once, before memory is
        machine.copy_bandwidth(machine.BEYOND_CACHES)
        before = held()
        step = build((VARIANTS | SINGLE_PROCESS)[name], self.case, self._batch)
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
        apart = max(abs(losses[subnet] / loss - 1) for subnet, loss in self._losses.items())
        self.keep(name, apart=apart)
        if not apart <= LOSS_RTOL[self.case.precision]:
            self.keep(name, wrong=f"its first losses are {apart:.1e} apart from the comparison's")
        for _ in range(WARM_UP):
            step()
        self.keep(name, peak_MiB=(peak_of(step) - before) / MIB)
        step()
        self.keep(name, ms=[1e3 * between_events(step) for _ in range(FIRST)], turns=False)
        self.keep(name, syncs=syncs_of(step))
        if self.lines[name]["syncs"] and (VARIANTS | SINGLE_PROCESS)[name].policy == "any":
            self.keep(name, waits=where_it_waits(step))
        self._steps[name] = step

    def run(self, seconds: float) -> bool:
        """Enter all, then time them in turns for about so many seconds; False if the GPU is broken.

        Others wait for the GPU from the beginning, but not for minutes of torch.compile.
        """
        if self._other == page.COMPILED:
            if not self._enter_all():
                return False
            with records.alone():
                return self._take_turns(seconds)
        with records.alone():
            return self._enter_all() and self._take_turns(seconds)

    def _enter_all(self) -> bool:
        for name in [page.EAGER, self._other] if self._other else VARIANTS:
            self.console.print(f"{page.title(asdict(self.case))}: {name}")
            if self._safely(name, partial(self.enter, name)):
                return False
        if page.EAGER in self._steps:
            self._steps[page.AGAIN] = self._steps[page.EAGER]
            self.lines[page.AGAIN] = dict(self.lines[page.EAGER])
        return True

    def _take_turns(self, seconds: float) -> bool:
        firsts = {name: statistics.median(self.lines[name]["ms"]) / 1e3 for name in self._steps}
        steps = {name: max(1, round(SAMPLE / first)) for name, first in firsts.items()}
        total = sum(steps[name] * first for name, first in firsts.items())
        rounds = min(max(round(seconds / max(total, 1e-6)), ROUNDS[0]), ROUNDS[1])
        times: dict[str, list[float]] = {name: [] for name in self._steps}
        retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)
        for turn in range(rounds):
            names = list(self._steps)
            for index in range(len(names)):
                name = names[(turn + index) % len(names)]

                def sample(name: str = name) -> None:
                    step = self._steps[name]
                    times[name].append(1e3 * between_events(lambda: [step() for _ in range(steps[name])]) / steps[name])

                if self._safely(name, sample):
                    return False
        retries = torch.cuda.memory_stats().get("num_alloc_retries", 0) - retries
        for name in self._steps:
            self.keep(name, ms=times[name], turns=True, steps=steps[name], retries=retries)
        return True

    def _safely(self, name: str, run: Callable[[], None]) -> bool:
        """Note what goes wrong, and leave that variant out; returns whether the GPU is broken."""
        try:
            run()
        except Exception as error:  # Triton's and the libraries' have no common ancestor
            said = [line for line in str(error).splitlines() if line.strip()] or [""]
            self.keep(name, error=f"{type(error).__name__}: {said[0]}"[:300], trace=traceback.format_exc()[-4000:])
            self.console.print(f"[red]{name}: {self.lines[name]['error']}", markup=True)
            self._steps.pop(name, None)
            del error
        if is_broken():
            self.console.print("[red]the GPU is broken for this process: the rest is left out")
            return True
        return False


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="DSPNET_BENCH_DTYPE=bf16, tf32 or fp32 [fp32] says in what, DSPNET_BENCH_RESULTS=FILE keeps everything.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("network", nargs="?", choices=FAMILIES, default="mobilenet_v3_large")
    parser.add_argument("images", nargs="?", type=int, default=256, help="of a batch, two views of each [%(default)s]")
    parser.add_argument("pixels", nargs="?", type=int, default=128, help="height and width [%(default)s]")
    parser.add_argument("--compiled", action="store_const", dest="other", const=page.COMPILED, help="minutes")
    parser.add_argument("--tried", action="store_const", dest="other", const=page.TRIED, help="a minute or two")
    parser.add_argument("--seconds", type=float, default=8, help="for taking turns, about [%(default)s]")
    options = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=160)
    if not torch.cuda.is_available():
        parser.exit(2, "error: there is no CUDA device: python -m benchmarks.step times the CPU\n")
    race = Race(Case(options.network, options.images, options.pixels), console, options.other)
    sound = race.run(options.seconds)
    console.print(page.step_table({**asdict(race.case), **race.limit}, race.lines), markup=False)
    sys.exit(not sound or bool(page.faults_of(race.lines)))


if __name__ == "__main__":
    main()
