"""A family against separate runs: how the runs are made and evaluated, and what comes out.

OUT/runs/NAME-seedK/     ordinary run directories of train.pretrain: w0.50-seed0, ..., family-n4-seed0, ...
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import PretrainConfig
from ..data.backends import choose_backend
from ..evaluation.protocols.knn import KnnOptions, evaluate_knn, publish_knn
from ..evaluation.protocols.linear import LinearOptions, evaluate_linear, publish_linear
from ..evaluation.results import Report
from ..pretraining.run import PretrainRun, open_train_images
from ..run import checkpoint
from ..run.device import choose_device
from ..run.run_directory import open_run
from ..run.saved_config import CONFIG
from .design import Comparison
from .measuring import Measured
from .ratios import SINGLE_PROCESS, ratios
from .seeds import over_seeds
from .times import taken, timed_step


def compare(comparison: Comparison) -> Report:
    """Make all runs that are not there yet, evaluate and measure; returns what compare.json holds.

    KeyboardInterrupt if it was stopped, after saving. InputError if the folder holds other runs or the images cannot be
    used.
    """
    recipe = comparison.recipe
    device = choose_device(recipe.device)
    backend = choose_backend(recipe.data_backend, open_train_images(recipe), device)
    places = [(variant, seed) for seed in comparison.seeds for variant in comparison.trained]
    accuracies: dict[str, dict[int, dict[str, Any]]] = {variant.name: {} for variant in comparison.trained}
    for index, (variant, seed) in enumerate(places):
        out = comparison.place(variant, seed)
        print(f"run {index + 1} of {len(places)}: {variant.label}, seed {seed}, in {out}", flush=True)
        groups = recipe.bn_groups or 1  # as a run of one rank keeps it
        config = replace(variant.config, out=str(out), seed=seed, data_backend=backend, bn_groups=groups)
        _train(config, comparison.steps)
        accuracies[variant.name][seed] = _evaluate(comparison, out)
    measured = {variant.name: timed_step(comparison, variant) for variant in comparison.trained}
    return _report(comparison, accuracies, measured)


def _train(config: PretrainConfig, steps: int) -> None:
    """Begin the run, go on with it, or leave it if it is finished."""
    out = Path(config.out)
    begun = (out / CONFIG).exists()
    if begun:
        open_run(config, resume=True)  # which refuses a run of another recipe
    if checkpoint.latest_step(out / "checkpoints") < steps:
        PretrainRun(config, resume=begun).run()
        gc.unfreeze()  # what the run froze is free to go
        gc.collect()


def _evaluate(comparison: Comparison, out: Path) -> dict[str, Any]:
    """{"kNN": {network: {"accuracy", "interval"}}}, and "linear" if it is wanted."""
    recipe, options = comparison.recipe, comparison.options
    shared: dict[str, Any] = {"workers": recipe.workers, "device": recipe.device, "fast_kernels": recipe.fast_kernels}
    report = evaluate_knn(out, KnnOptions(k=options.k, references=options.references, **shared))
    publish_knn(out, report)
    found = {"kNN": _accuracies(report, "pretrained", "majority")}
    if options.linear_epochs:
        report = evaluate_linear(out, LinearOptions(epochs=options.linear_epochs, **shared))
        publish_linear(out, report)
        found["linear"] = _accuracies(report, "linear", "top1")
    return found


def _accuracies(report: Report, column: str, accuracy: str) -> dict[str, dict[str, float]]:
    return {
        name: {"accuracy": network[column][accuracy], "interval": network[column]["interval"]}
        for name, network in report["networks"].items()
    }


def _report(
    comparison: Comparison, accuracies: Mapping[str, Mapping[int, Any]], measured: Mapping[str, Measured]
) -> Report:
    report = comparison.plan()
    trained = comparison.trained
    for variant in trained:
        report["runs"][variant.name]["measured"] = taken(comparison, variant, measured[variant.name])
    for protocol in accuracies[trained[0].name][comparison.seeds[0]]:
        found = {v.name: {dn: over_seeds(accuracies[v.name], protocol, dn) for dn in v.config.names()} for v in trained}
        alone = {dn: score for v in comparison.alone if v.name in found for dn, score in found[v.name].items()}
        families = {v.name: found[v.name] for v in comparison.families}
        report["accuracy"][protocol] = {**({SINGLE_PROCESS: alone} if alone else {}), **families}
    report["ratios"] = ratios(report["runs"])
    return report
