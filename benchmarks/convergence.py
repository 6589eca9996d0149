"""`python -m benchmarks.convergence`: do other kernels, or bf16, train as well? Losses and kNN of short real runs.

One short run per seed with the native kernels says how far runs lie apart by chance. Runs of the same seeds with the
fast kernels start from the same weights and see the same images, so they differ by rounding alone, which training then
amplifies; they are as good if they stay within the spread of the seeds. `--golden` keeps the native runs for the test
that holds every change to that (tests/train/test_convergence.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dspnet_fast.ops import registry
from train.config import PretrainConfig
from train.data.augment import byol
from train.data.loader import EpochOrder, two_view_batches
from train.data.sets import open_images
from train.probe import Probe
from train.trainer import Trainer

GOLDEN = Path(__file__).parent.parent / "tests" / "train" / "golden_losses.json"
SEEDS = (0, 1, 2)
WINDOW = 10  # steps that losses are averaged over: single steps are noise
RECIPE = {
    "data": "cifar10",
    "network": "mobilenet_v3_large",
    "dns": "w0.25,w0.375,w0.50",
    "stem": "small",
    "image_size": 24,
    "min_scale": 0.3,
    "hidden_features": 256,
    "out_features": 64,
    "epochs": 1,
    "batch_size": 48,
    "train_images": 4800,
    "subnets_per_step": 3,
    "base_lr": 3.0,
    "warmup_epochs": 0.1,
    "tau": 0.97,
    "workers": 0,
    "probe_images": 3000,
}


def run(seed: int, policy: str, precision: str = "fp32", report: Any = lambda step, steps: None) -> dict[str, Any]:
    """One run of RECIPE: {"losses": {subnet: [one per window]}, "knn": {subnet: accuracy}}."""
    config = PretrainConfig(**RECIPE, seed=seed, precision=precision)
    before = registry.get_policy()
    registry.set_policy(policy)
    try:
        images = open_images(config.data, "train")
        order = EpochOrder(config.train_images or len(images), config.batch_size, seed, config.epochs)
        trainer = Trainer(config, order.steps_per_epoch, torch.device("cpu"))
        losses: dict[str, list[float]] = {dn.name: [] for dn in trainer.model.family}
        views = byol(config.image_size, config.min_scale)
        for step, batch in enumerate(two_view_batches(images, views, order, 0), 1):
            for name, loss in trainer.train_step(batch).items():
                losses[name].append(loss.item())
            report(step, order.steps_per_epoch)
        probe = Probe(images, open_images(config.data, "test"), config.probe_images, config.image_size, trainer.device)
        knn = probe.measure(trainer.model.online.encoder, trainer.model.family)["knn"]
    finally:
        registry.set_policy(before)
    return {"losses": {name: list(_windows(values)) for name, values in losses.items()}, "knn": knn}


def _windows(values: list[float]) -> Iterator[float]:
    for start in range(0, len(values), WINDOW):
        part = values[start : start + WINDOW]
        yield sum(part) / len(part)


def spread(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How far runs of several seeds lie apart: per subnet the largest range of a window's loss, and of kNN."""
    names = runs[0]["knn"]
    return {
        "losses": {n: max(max(w) - min(w) for w in zip(*(r["losses"][n] for r in runs), strict=True)) for n in names},
        "knn": {n: max(r["knn"][n] for r in runs) - min(r["knn"][n] for r in runs) for n in names},
    }


def distance(a: dict[str, Any], b: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How far two runs lie apart, in the same terms."""
    return spread([a, b])


def main() -> None:
    """Run all variants and print how far they lie apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="auto,auto bf16", help="what to compare with native [%(default)s]")
    parser.add_argument("--golden", action="store_true", help=f"write the native runs to {GOLDEN.name}")
    options = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    for variant in ["native", *options.variants.split(",")]:
        policy, _, precision = variant.partition(" ")
        for seed in SEEDS:

            def report(step: int, steps: int, label: str = f"{variant}, seed {seed}") -> None:
                print(f"\r{label}: step {step} of {steps}   ", end="", file=sys.stderr, flush=True)

            results.setdefault(variant, []).append(run(seed, policy, precision or "fp32", report))
    print(file=sys.stderr)
    native = results["native"]
    if options.golden:
        GOLDEN.write_text(json.dumps({"recipe": RECIPE, "window": WINDOW, "seeds": native}, indent=1) + "\n")
    by_chance = spread(native)
    table = Table("subnet", "runs", "kNN of the seeds", "last losses", "largest loss difference", "kNN difference")
    for name in native[0]["knn"]:
        for variant, runs in results.items():
            apart = [distance(r, n) for r, n in zip(runs, native, strict=True)] if variant != "native" else [by_chance]
            table.add_row(
                name,
                variant if variant != "native" else "native, seeds among themselves",
                " ".join(f"{100 * r['knn'][name]:.1f}" for r in runs),
                " ".join(f"{r['losses'][name][-1]:.3f}" for r in runs),
                f"{max(d['losses'][name] for d in apart):.3f}",
                f"{100 * max(d['knn'][name] for d in apart):.1f} points",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
