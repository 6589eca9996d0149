"""`python -m benchmarks.convergence`: do other kernels, or bf16, train as well? Losses and kNN of short real runs.

One short run per seed with the native kernels says how far runs lie apart by chance. Runs of the same seeds with the
fast kernels start from the same weights and see the same images, so they differ by rounding alone, which training then
amplifies; they are as good if they stay within the spread of the seeds. `--golden` keeps the native runs for the test
that holds every change to that (tests/train/test_convergence.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table

from dspnet_fast.ops import registry
from train.config import PretrainConfig
from train.data.bad_images import BadImages
from train.data.datasets import open_images
from train.data.loader import two_view_batches
from train.data.sampler import EpochSampler
from train.data.views.augmentation import byol
from train.pretraining.probe import Probe
from train.pretraining.trainer import Trainer

GOLDEN = Path(__file__).parent.parent / "tests" / "train" / "golden_losses.json"
SEEDS = (0, 1, 2)
WINDOW = 10  # steps that losses are averaged over: single steps are noise
# A learning rate at which rounding is not amplified beyond recognition within these hundred steps. MobileNetV3 learns
# to agree in them, but hardly to classify: its kNN stays near chance. The ResNets' says something.
SHORT = {
    "data": "cifar10",
    "stem": "small",
    "image_size": 32,
    "min_scale": 0.3,
    "hidden_features": 256,
    "out_features": 64,
    "epochs": 1,
    "batch_size": 32,
    "train_images": 3200,
    "subnets_per_step": 3,
    "base_lr": 1.0,
    "warmup_epochs": 0.1,
    "tau": 0.98,
    "workers": 0,
    "probe_images": 2000,
}
RECIPES: dict[str, dict[str, Any]] = {
    "mobilenet_v3": {**SHORT, "network": "mobilenet_v3_large", "dns": "w0.25,w0.375,w0.50"},
    "resnet": {**SHORT, "network": "resnet", "dns": "c8-d1111,c12-d1111,c16-d1111"},
}
Run = dict[str, dict[str, Any]]


def run(
    recipe: str,
    seed: int,
    policy: str,
    precision: str = "fp32",
    device: str = "cpu",
    report: Callable[[int, int], None] = lambda step, steps: None,
) -> Run:
    """One run of a recipe: {"losses": {subnet: [one per window]}, "knn": {subnet: accuracy}}."""
    config = PretrainConfig(**RECIPES[recipe], seed=seed, precision=precision)
    before = registry.get_policy()
    registry.set_policy(policy)
    try:
        images = open_images(config.data, "train")
        order = EpochSampler(config.train_images or len(images), config.batch_size, seed, config.epochs)
        trainer = Trainer(config, order.steps_per_epoch, torch.device(device))
        losses: dict[str, list[float]] = {dn.name: [] for dn in trainer.model.family}
        views = byol(config.image_size, config.min_scale)
        for step, batch in enumerate(two_view_batches(images, views, order, 0), 1):
            for name, loss in trainer.train_step(batch).items():
                losses[name].append(loss.item())
            report(step, order.steps_per_epoch)
        test = open_images(config.data, "test")
        probe = Probe(images, test, config.probe_images, config.image_size, trainer.device, BadImages())
        knn = probe.measure(trainer.model.online.encoder, trainer.model.family)["knn"]
    finally:
        registry.set_policy(before)
    return {"losses": {name: list(_windows(values)) for name, values in losses.items()}, "knn": knn}


def _windows(values: list[float]) -> Iterator[float]:
    for start in range(0, len(values), WINDOW):
        part = values[start : start + WINDOW]
        yield round(sum(part) / len(part), 4)


def distance(runs: Sequence[Run]) -> Run:
    """How far runs lie apart: per subnet the largest range of a window's loss, and of kNN."""
    names = runs[0]["knn"]
    return {
        "losses": {n: max(max(w) - min(w) for w in zip(*(r["losses"][n] for r in runs), strict=True)) for n in names},
        "knn": {n: max(r["knn"][n] for r in runs) - min(r["knn"][n] for r in runs) for n in names},
    }


def by_chance(recipe: str, seeds: Sequence[Run]) -> Run:
    """How far runs may lie apart: as far as those of several seeds, and in kNN as far as counting so few images leaves
    open: three standard errors of a difference, since of a dozen that are looked at none may be farther by chance."""
    allowed = distance(seeds)
    queries = RECIPES[recipe]["probe_images"] / 2
    for name in allowed["knn"]:
        accuracy = sum(run["knn"][name] for run in seeds) / len(seeds)
        counting = 3 * (2 * accuracy * (1 - accuracy) / queries) ** 0.5
        allowed["knn"][name] = max(allowed["knn"][name], counting)
    return allowed


def main() -> None:
    """Run all variants and print how far they lie apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="auto,auto bf16", help="what to compare with native [%(default)s]")
    parser.add_argument("--device", default="cpu", help="where, cpu or cuda [%(default)s]")
    parser.add_argument("--golden", action="store_true", help=f"write the native runs to {GOLDEN.name}")
    options = parser.parse_args()
    variants = ["native", *filter(None, options.variants.split(","))]
    golden: dict[str, Any] = {"recipes": RECIPES, "window": WINDOW, "seeds": {}}
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(RECIPES) * len(variants) * len(SEEDS))
        for recipe in RECIPES:
            results: dict[str, list[Run]] = {}
            for variant in variants:
                policy, _, precision = variant.partition(" ")
                for seed in SEEDS:
                    description = f"{recipe}, {variant}, seed {seed}"

                    def report(step: int, steps: int, description: str = description) -> None:
                        progress.update(task, description=f"{description}, step {step} of {steps}")

                    results.setdefault(variant, []).append(
                        run(recipe, seed, policy, precision or "fp32", options.device, report)
                    )
                    progress.advance(task)
            progress.console.print(_table(recipe, results))
            golden["seeds"][recipe] = results["native"]
    if options.golden:
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


def _table(recipe: str, results: dict[str, list[Run]]) -> Table:
    native = results["native"]
    allowed = by_chance(recipe, native)
    table = Table(
        "subnet", "runs", "last losses", "loss apart", "kNN, %", "kNN apart", title=f"{recipe}, {len(native)} seeds"
    )
    for name in native[0]["knn"]:
        for variant, runs in results.items():
            pairs = [distance(pair) for pair in zip(runs, native, strict=True)]
            apart = [allowed] if runs is native else pairs
            table.add_row(
                name,
                f"{variant}: what seeds allow" if runs is native else variant,
                " ".join(f"{r['losses'][name][-1]:.3f}" for r in runs),
                f"{max(d['losses'][name] for d in apart):.3f}",
                " ".join(f"{100 * r['knn'][name]:.1f}" for r in runs),
                f"{100 * max(d['knn'][name] for d in apart):.1f}",
            )
    return table


if __name__ == "__main__":
    main()
