"""`python -m benchmarks.convergence`: losses and kNN accuracy of short runs with fast kernels and bf16.

Native runs with several seeds show how much runs differ by chance. Runs with fast kernels and the same seeds have the
same initial weights and images, so only rounding differs, which training amplifies. They pass if they differ from the
native run by no more than the seeds do. `--golden` saves the native runs as the reference of
tests/train/test_convergence.py.
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
WINDOW = 10  # steps over which losses are averaged to reduce noise
# With this learning rate 100 steps amplify rounding only moderately. In so few steps MobileNetV3's loss falls, but its
# kNN accuracy stays near chance; that of the ResNets rises.
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
SETTINGS: dict[str, dict[str, Any]] = {
    "mobilenet_v3": {**SHORT, "network": "mobilenet_v3_large", "dns": "w0.25,w0.375,w0.50"},
    "resnet": {**SHORT, "network": "resnet", "dns": "c8-d1111,c12-d1111,c16-d1111"},
}
Run = dict[str, dict[str, Any]]


def run(
    setting: str,
    seed: int,
    policy: str,
    precision: str = "fp32",
    device: str = "cpu",
    report: Callable[[int, int], None] = lambda step, steps: None,
) -> Run:
    """Train one run; returns {"losses": {subnet: [mean of each window]}, "knn": {subnet: accuracy}}."""
    config = PretrainConfig(**SETTINGS[setting], seed=seed, precision=precision, recipe="paper")
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
    """Largest range of the loss in a window, and range of kNN accuracy, for each subnet."""
    names = runs[0]["knn"]
    return {
        "losses": {n: max(max(w) - min(w) for w in zip(*(r["losses"][n] for r in runs), strict=True)) for n in names},
        "knn": {n: max(r["knn"][n] for r in runs) - min(r["knn"][n] for r in runs) for n in names},
    }


def allowed_distance(setting: str, seeds: Sequence[Run]) -> Run:
    """The distance of native runs with several seeds; in kNN accuracy at least three standard errors of a difference.

    Three standard errors, because about a dozen differences are compared.
    """
    allowed = distance(seeds)
    queries = SETTINGS[setting]["probe_images"] / 2
    for name in allowed["knn"]:
        accuracy = sum(run["knn"][name] for run in seeds) / len(seeds)
        counting = 3 * (2 * accuracy * (1 - accuracy) / queries) ** 0.5
        allowed["knn"][name] = max(allowed["knn"][name], counting)
    return allowed


def main() -> None:
    """Run all variants and print their distances."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants", default="auto,auto bf16", help="policies and precisions to compare with native [%(default)s]"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda [%(default)s]")
    parser.add_argument("--golden", action="store_true", help=f"save the native runs in {GOLDEN.name}")
    options = parser.parse_args()
    variants = ["native", *filter(None, options.variants.split(","))]
    golden: dict[str, Any] = {"settings": SETTINGS, "window": WINDOW, "seeds": {}}
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(SETTINGS) * len(variants) * len(SEEDS))
        for setting in SETTINGS:
            results: dict[str, list[Run]] = {}
            for variant in variants:
                policy, _, precision = variant.partition(" ")
                for seed in SEEDS:
                    description = f"{setting}, {variant}, seed {seed}"

                    def report(step: int, steps: int, description: str = description) -> None:
                        progress.update(task, description=f"{description}, step {step} of {steps}")

                    results.setdefault(variant, []).append(
                        run(setting, seed, policy, precision or "fp32", options.device, report)
                    )
                    progress.advance(task)
            progress.console.print(_table(setting, results))
            golden["seeds"][setting] = results["native"]
    if options.golden:
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


def _table(setting: str, results: dict[str, list[Run]]) -> Table:
    native = results["native"]
    allowed = allowed_distance(setting, native)
    table = Table(
        "subnet",
        "runs",
        "last losses",
        "loss distance",
        "kNN, %",
        "kNN distance",
        title=f"{setting}, {len(native)} seeds",
    )
    for name in native[0]["knn"]:
        for variant, runs in results.items():
            pairs = [distance(pair) for pair in zip(runs, native, strict=True)]
            distances = [allowed] if runs is native else pairs
            table.add_row(
                name,
                f"{variant}: allowed distance" if runs is native else variant,
                " ".join(f"{r['losses'][name][-1]:.3f}" for r in runs),
                f"{max(d['losses'][name] for d in distances):.3f}",
                " ".join(f"{100 * r['knn'][name]:.1f}" for r in runs),
                f"{100 * max(d['knn'][name] for d in distances):.1f}",
            )
    return table


if __name__ == "__main__":
    main()
