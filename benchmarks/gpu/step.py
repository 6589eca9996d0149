"""`python -m benchmarks.gpu.step`: a whole DSPNet training step on a GPU, ours against plain PyTorch.

The comparison is benchmarks/eager.py: sliced weights, F.batch_norm, updates parameter by parameter; channels-last, and
for bf16 by autocast, as published slimmable code trains. It is timed with and without torch.compile of each subnet.
Ours is train/'s own step: launched kernel by kernel, and replayed as CUDA graphs. Every step takes the smallest, the
full and the middle two of the family.

A variant's losses in its first step must be the comparison's, or it is not timed. Times are medians of CUDA events;
peak memory is what torch's allocator held at most; `syncs` counts how often one step made the host wait.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.eager import EagerStep
from dspnet_fast.ops import registry
from train.config import PretrainConfig
from train.trainer import Trainer

MIB = 2**20
LOSS_RTOL = {"fp32": 1e-3, "bf16": 3e-2}
NETWORKS = {
    "mobilenet_v3_large": ("w0.50,w0.625,w0.75,w0.875,w1.00", "w0.50,w0.625,w0.875,w1.00"),
    "resnet": (
        "c64-d2222,c64-d2343,c64-d3463,c96-d2222,c96-d2343,c96-d3463",
        "c64-d2222,c64-d2343,c96-d2222,c96-d3463",
    ),
}
# network, images, pixels, precision
CASES = [
    ("mobilenet_v3_large", 1024, 128, "bf16"),
    ("mobilenet_v3_large", 1024, 128, "fp32"),
    ("mobilenet_v3_large", 256, 224, "bf16"),
    ("mobilenet_v3_large", 64, 96, "bf16"),
    ("resnet", 512, 128, "bf16"),
]
EAGER, COMPILED = "eager channels_last", "torch.compile"


@dataclass(frozen=True)
class Variant:
    """A way to compute the step: ours under a policy, or the comparison, with no policy."""

    policy: str | None = None
    graphs: bool = False
    compiled: bool = False


VARIANTS = {
    EAGER: Variant(),
    COMPILED: Variant(compiled=True),
    "ours native": Variant("native"),
    "ours": Variant("any"),
    "ours, graphs": Variant("any", graphs=True),
}


def build(variant: Variant, network: str, images: int, pixels: int, precision: str) -> Callable[[Tensor], dict]:
    """The variant's step on a batch of two views; all start with the same weights."""
    config = PretrainConfig(
        network=network,
        dns=NETWORKS[network][1],
        image_size=pixels,
        batch_size=images,
        subnets_per_step=4,
        momentum_bn="off",  # published slimmable code has none
        precision=precision if variant.policy else "fp32",
        full_only_epochs=0,
        warmup_epochs=0,
        epochs=1,
        no_cuda_graphs=not variant.graphs,
    )
    trainer = Trainer(config, 100_000, torch.device("cuda"))  # so long that learning rate and tau stay what they are
    if variant.policy is not None:
        registry.set_policy(variant.policy)
        return trainer.train_step
    subnets, lr, tau = list(trainer.model.family), trainer.learning_rate, trainer.tau
    eager = EagerStep(trainer.model, precision=precision, compiled=variant.compiled)
    return lambda batch: eager.step(batch, subnets, lr, tau)


def syncs_of(step: Callable[[], object]) -> int:
    """How often a call makes the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def measure(step: Callable[[], object], rounds: int) -> dict[str, Any]:
    """Milliseconds of each round, peak memory, host synchronisations."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        step()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended))
    return {"ms": times, "peak_MiB": torch.cuda.max_memory_allocated() / MIB, "syncs": syncs_of(step)}


def run_case(case: tuple[str, int, int, str], names: list[str], rounds: int, console: Console) -> dict[str, Any]:
    """All variants of one case, one after another; a variant that fails is named with its error."""
    network, images, pixels, precision = case
    torch.manual_seed(0)
    batch = torch.randint(256, (2 * images, 3, pixels, pixels), dtype=torch.uint8, device="cuda")
    lines: dict[str, Any] = {}
    expected: dict[str, float] = {}
    for name in names:
        console.print(f"{network} {images} x {pixels} px {precision}: {name}", highlight=False)
        try:
            step = build(VARIANTS[name], *case)
            losses = {subnet: loss.item() for subnet, loss in step(batch).items()}
            expected = expected or losses
            apart = max(abs(losses[subnet] / loss - 1) for subnet, loss in expected.items())
            if not apart <= LOSS_RTOL[precision]:
                raise RuntimeError(f"its first losses are {apart:.1e} apart from those of {names[0]}: not timed")
            lines[name] = measure(partial(step, batch), rounds) | {"losses": losses}
        except RuntimeError as error:
            lines[name] = {"error": str(error).splitlines()[0]}
            console.print(f"[red]{lines[name]['error']}")
        step = None  # type: ignore[assignment]
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return {"network": network, "images": images, "pixels": pixels, "precision": precision, "variants": lines}


def environment() -> dict[str, str]:
    """What the figures are of."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()
    return {
        "GPU": torch.cuda.get_device_name(),
        "driver": driver[0] if driver else "unknown",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "kernels": json.dumps(registry.serving("cuda")),
    }


def table(case: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a case."""
    header = ["step", "ms", "images/s", "x eager", "x compile", "peak MiB", "of eager", "syncs"]
    variants = case["variants"]

    def median(name: str) -> float | None:
        return statistics.median(variants[name]["ms"]) if "ms" in variants.get(name, {}) else None

    def ratio(above: float | None, below: float | None) -> str:
        return f"{above / below:.2f}" if above and below else ""

    memory = variants.get(EAGER, {}).get("peak_MiB")
    rows = []
    for name, line in variants.items():
        ms = median(name)
        if ms is None:
            rows.append([name, line["error"], *[""] * 6])
            continue
        rows.append(
            [
                name,
                f"{ms:.1f}",
                f"{1e3 * case['images'] / ms:.0f}",
                ratio(median(EAGER), ms),
                ratio(median(COMPILED), ms),
                f"{line['peak_MiB']:.0f}",
                ratio(line["peak_MiB"], memory),
                str(line["syncs"]),
            ]
        )
    return header, rows


def title(case: dict[str, Any]) -> str:
    """What a case is."""
    subnets = NETWORKS[case["network"]][1].replace(",", " ")
    return f"{case['network']}, {subnets}, {case['images']} images of {case['pixels']} px, {case['precision']}"


def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    parts = ["# A training step on a GPU", ", ".join(f"{k} {v}" for k, v in results["environment"].items())]
    for case in results["cases"]:
        header, rows = table(case)
        lines = [header, ["---"] * len(header), *rows]
        parts += [f"## {title(case)}", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="*", help="only these cases, by number from 0")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, help="only these")
    parser.add_argument("--compile-cases", type=int, nargs="*", default=[0], help="cases with torch.compile: minutes")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="folder for step.json and step.md")
    options = parser.parse_args()
    console = Console()
    if not torch.cuda.is_available():
        parser.exit(2, "error: there is no CUDA device: python -m benchmarks.step times the CPU\n")
    results: dict[str, Any] = {"environment": environment(), "cases": []}
    chosen = range(len(CASES)) if options.cases is None else options.cases
    for number in chosen:
        names = [
            name
            for name in options.variants or VARIANTS
            if not VARIANTS[name].compiled or number in options.compile_cases
        ]
        case = run_case(CASES[number], names, options.rounds, console)
        results["cases"].append(case)
        header, rows = table(case)
        shown = Table(*header, title=title(case))
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
        if options.out:  # after every case: a run that is cut off keeps what it has
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "step.json").write_text(json.dumps(results, indent=1) + "\n")
            (options.out / "step.md").write_text(markdown(results))


if __name__ == "__main__":
    main()
