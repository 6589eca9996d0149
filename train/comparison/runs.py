"""Runs of a comparison: training, evaluation and the report.

OUT/runs/NAME-seedK/     run directories of train.pretrain: w0.50-seed0, ..., family-n4-seed0, ...
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dspnet_fast.errors import InputError

from ..config import PretrainConfig
from ..data.pixel_options import resolve_pixels
from ..evaluation.protocols.knn import KnnOptions, evaluate_knn, publish_knn
from ..evaluation.protocols.linear import LinearOptions, evaluate_linear, publish_linear
from ..evaluation.results import Report
from ..pretraining import recipe
from ..pretraining.run import PretrainRun, open_train_images, resolve
from ..run import checkpoint
from ..run.device import choose_device
from ..run.run_directory import open_run
from ..run.saved_config import CONFIG
from ..selection.kernels import Kernels, choose_kernels
from ..teachers.teacher import read_facts
from .curves import curves_over_seeds
from .design import Comparison
from .measuring import StepMeasurement
from .ratios import ALONE, ratios
from .seeds import score_over_seeds
from .times import run_times, timed_step


def compare(comparison: Comparison) -> Report:
    """Train the runs that are not finished, evaluate all of them and measure their steps.

    Args:
        comparison: design of the comparison.

    Returns:
        The report, the content of compare.json.

    Raises:
        InputError: if the folder contains other runs, or the images cannot be used.
        KeyboardInterrupt: after Ctrl-C, when a checkpoint has been saved.
    """
    images = open_train_images(comparison.config)
    comparison = Comparison(comparison.options, resolve_pixels(comparison.config, images))
    base = comparison.config
    device = choose_device(base.device)
    resolved = resolve(base, images, device, world_size=1)
    kernels = _kernels(comparison, resolved, device) if base.fast_kernels else None
    for line in recipe.lines(comparison.choices, comparison.images):
        print(line, flush=True)
    runs = [(variant, seed) for seed in comparison.seeds for variant in comparison.trained]
    accuracies: dict[str, dict[int, dict[str, Any]]] = {variant.name: {} for variant in comparison.trained}
    for index, (variant, seed) in enumerate(runs):
        out = comparison.run_directory(variant, seed)
        print(f"run {index + 1} of {len(runs)}: {variant.label}, seed {seed}, in {out}", flush=True)
        config = replace(
            variant.config,
            out=str(out),
            seed=seed,
            data_backend=resolved.data_backend,
            bn_groups=resolved.bn_groups,
        )
        _train(config, comparison.steps, kernels)
        accuracies[variant.name][seed] = _evaluate(comparison, out)
    measured = {variant.name: timed_step(comparison, variant, kernels) for variant in comparison.trained}
    return _report(comparison, accuracies, measured)


def _kernels(comparison: Comparison, resolved: PretrainConfig, device: torch.device) -> Kernels:
    """The kernels of all runs: the choice for the family, kept in the comparison's folder for a repeated command."""
    out = comparison.out
    config = replace(comparison.families[-1].config, out=str(out), bn_groups=resolved.bn_groups)
    steps = len(comparison.trained) * len(comparison.seeds) * comparison.steps
    kernels = choose_kernels(config, steps, device, resume=True)
    kernels.write(out)
    return kernels


def _train(config: PretrainConfig, steps: int, kernels: Kernels | None) -> None:
    """Start or resume a run unless it is finished."""
    out = Path(config.out)
    begun = (out / CONFIG).exists()
    if begun:
        open_run(config, resume=True)  # raises InputError for a run with other options
        facts = read_facts(out)
        if (facts and facts["source"]) != config.teacher:
            raise InputError(f"the run in {out} was begun with another --teacher: choose another --out")
    if checkpoint.latest_step(out / "checkpoints") < steps:
        PretrainRun(config, begun, kernels, allow_untrained=True).run()
        gc.unfreeze()  # the run froze its objects: without this they are never collected
        gc.collect()


def _evaluate(comparison: Comparison, out: Path) -> dict[str, Any]:
    """Accuracies of a run: {"kNN": {network: {"accuracy", "interval"}}}, and "linear" with --linear-epochs."""
    config, options = comparison.config, comparison.options
    shared: dict[str, Any] = {"workers": config.workers, "device": config.device, "fast_kernels": config.fast_kernels}
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
    comparison: Comparison, accuracies: Mapping[str, Mapping[int, Any]], measured: Mapping[str, StepMeasurement]
) -> Report:
    report = comparison.initial_report()
    trained = comparison.trained
    for variant in trained:
        report["runs"][variant.name]["measured"] = run_times(comparison, variant, measured[variant.name])
    for protocol in accuracies[trained[0].name][comparison.seeds[0]]:
        found = {
            v.name: {dn: score_over_seeds(accuracies[v.name], protocol, dn) for dn in v.config.names()} for v in trained
        }
        alone = {dn: score for v in comparison.alone if v.name in found for dn, score in found[v.name].items()}
        families = {v.name: found[v.name] for v in comparison.families}
        report["accuracy"][protocol] = {**({ALONE: alone} if alone else {}), **families}
    report["ratios"] = ratios(report["runs"])
    largest = comparison.family.full.name
    directories = {
        v.name: [comparison.run_directory(v, seed) for seed in comparison.seeds]
        for v in trained
        if largest in v.config.names()
    }
    report["curves"] = curves_over_seeds(directories, largest, comparison.epoch_steps)
    return report
