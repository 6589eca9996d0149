"""A family against separate runs: which runs that takes, how they are made, and what comes out.

OUT/runs/NAME-seedK/     ordinary run directories of train.pretrain: w0.50-seed0, ..., family-n4-seed0, ...
OUT/measured/NAME.json   what a step of that run takes, in parts (train/comparison/measuring.py)
"""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dspnet_fast.errors import InputError
from dspnet_fast.models import family as family_of

from .. import counting
from ..config import PretrainConfig, flag, option
from ..data.backends import choose_backend
from ..data.order import EpochOrder
from ..data.sets import size_of
from ..evaluation.protocols.knn import KnnOptions, evaluate_knn, publish_knn
from ..evaluation.protocols.linear import LinearOptions, evaluate_linear, publish_linear
from ..evaluation.results import Report
from ..planning import images_of
from ..pretrain import Pretraining, open_train_images
from ..run import atomic, checkpoint, fingerprint
from ..run.device import choose_device
from ..run.rundir import CONFIG, open_run, read_metrics
from .compared import ALONE
from .measuring import Measured, measure
from .ratios import ratios

RUNS, MEASURED = "runs", "measured"
DECIDED = ("out", "seed", "subnets_per_step", "init_from")  # options of a run that the comparison decides


@dataclass(kw_only=True)
class CompareOptions:
    """comparison"""

    out: str = option("", "folder for the runs and the results")
    seeds: int | str = option(0, "seeds, such as 0,1,2: all runs are made with each")
    subnets_per_step: int | str = option(4, "subnets per step of the family; several, such as 2,3,4,5, are compared")
    no_separate_runs: bool = option(False, "train families only; what separate runs cost is counted all the same")
    k: int = option(20, "neighbours that vote in the kNN evaluation")
    references: int | None = option(None, "training images whose labels vote, drawn at random [all]")
    linear_epochs: int = option(0, "also evaluate linear classifiers, trained for so many epochs; 0 for not")
    timed_steps: int = option(5, "steps whose parts are timed, of every configuration")


@dataclass(frozen=True)
class Variant:
    """A run but for its seed: a network alone, or the family with so many subnets per step."""

    name: str
    label: str
    config: PretrainConfig
    alone: bool


class Comparison:
    """What is to be compared; InputError for a family or options that nothing can be compared of.

    Args:
        recipe: of all runs, but for what `DECIDED` names.

    Attributes:
        variants: networks alone, smallest first, then families.
        costs: of every network.
        images: how many there are to train on.
    """

    def __init__(self, options: CompareOptions, recipe: PretrainConfig) -> None:
        self.options, self.recipe = options, recipe
        self.out = Path(options.out)
        self.family = family_of(recipe.network, recipe.names())
        if len(self.family) < 2:
            raise InputError("a comparison needs a family: give --dns two networks or more")
        self.seeds = _numbers("seeds", options.seeds, 0)
        sampled = _numbers("subnets_per_step", options.subnets_per_step, 2)
        for low, high in zip(sampled, sampled[1:], strict=False):
            if low >= len(self.family):
                raise InputError(
                    f"--subnets-per-step {low} and {high} are the same for {len(self.family)} networks: leave one out"
                )
        for name in ("k", "timed_steps"):
            if getattr(options, name) < 1:
                raise InputError(f"{flag(name)} must be at least 1, not {getattr(options, name)}")
        if options.linear_epochs < 0:
            raise InputError(f"--linear-epochs cannot be negative: {options.linear_epochs}")
        self.alone = [Variant(dn, f"{dn} alone", replace(recipe, dns=dn), alone=True) for dn in self.family.names]
        dns = ",".join(self.family.names)
        self.families = [
            Variant(f"family-n{n}", f"family, n = {n}", replace(recipe, dns=dns, subnets_per_step=n), alone=False)
            for n in sampled
        ]
        self.variants = [*self.alone, *self.families]
        self.costs = counting.network_costs(recipe)
        self.size = size_of(recipe.data)
        self.images = images_of(recipe, self.size)
        references = self.size.train if options.references is None else options.references
        if not options.k <= references <= self.size.train:
            raise InputError(
                f"--k {options.k} neighbours among --references {references} of {self.size.train} images of "
                f"{recipe.data}: neither can be more than there are"
            )
        self.epoch_steps = EpochOrder(self.images, recipe.batch_size, 0, recipe.epochs).steps_per_epoch

    @property
    def trained(self) -> list[Variant]:
        """The variants that are run."""
        return self.families if self.options.no_separate_runs else self.variants

    @property
    def steps(self) -> int:
        """Of every run."""
        return self.recipe.epochs * self.epoch_steps

    def counted(self) -> dict[str, counting.Counted]:
        """What a run of each variant costs by count."""
        return {v.name: counting.count(v.config, self.epoch_steps, self.costs) for v in self.variants}

    def run(self) -> Report:
        """Make all runs that are not there yet, evaluate and measure; returns what compare.json holds.

        KeyboardInterrupt if it was stopped, after saving. InputError if the folder holds other runs or the images
        cannot be used.
        """
        device = choose_device(self.recipe.device)
        backend = choose_backend(self.recipe.data_backend, open_train_images(self.recipe), device)
        places = [(variant, seed) for seed in self.seeds for variant in self.trained]
        accuracies: dict[str, dict[int, dict[str, Any]]] = {variant.name: {} for variant in self.trained}
        for index, (variant, seed) in enumerate(places):
            out = self.place(variant, seed)
            print(f"run {index + 1} of {len(places)}: {variant.label}, seed {seed}, in {out}", flush=True)
            groups = self.recipe.bn_groups or 1  # as a run of one rank keeps it
            self._train(replace(variant.config, out=str(out), seed=seed, data_backend=backend, bn_groups=groups))
            accuracies[variant.name][seed] = self._evaluate(out)
        measured = {variant.name: self._measure(variant) for variant in self.trained}
        return self._report(accuracies, measured)

    def place(self, variant: Variant, seed: int) -> Path:
        """The directory of a run."""
        return self.out / RUNS / f"{variant.name}-seed{seed}"

    def _train(self, config: PretrainConfig) -> None:
        out = Path(config.out)
        begun = (out / CONFIG).exists()
        if begun:
            open_run(config, resume=True)  # which refuses a run of another recipe
        if checkpoint.latest_step(out / "checkpoints") < self.steps:
            Pretraining(config, resume=begun).run()
            gc.unfreeze()  # what the run froze is free to go
            gc.collect()

    def _evaluate(self, out: Path) -> dict[str, Any]:
        """{"kNN": {network: {"accuracy", "interval"}}}, and "linear" if it is wanted."""
        recipe, options = self.recipe, self.options
        shared: dict[str, Any] = {
            "workers": recipe.workers,
            "device": recipe.device,
            "fast_kernels": recipe.fast_kernels,
        }
        report = evaluate_knn(out, KnnOptions(k=options.k, references=options.references, **shared))
        publish_knn(out, report)
        found = {"kNN": _accuracies(report, "pretrained", "majority")}
        if options.linear_epochs:
            report = evaluate_linear(out, LinearOptions(epochs=options.linear_epochs, **shared))
            publish_linear(out, report)
            found["linear"] = _accuracies(report, "linear", "top1")
        return found

    def _measure(self, variant: Variant) -> Measured:
        """The parts of a step, kept under what they depend on."""
        path = self.out / MEASURED / f"{variant.name}.json"
        config, steps = variant.config, self.options.timed_steps
        of_machine = ("workers", "log_steps", "probe_epochs", "probe_images", "checkpoint_epochs", "max_bad_images")
        relevant = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in of_machine}
        key = fingerprint.digest(sorted(relevant.items()), steps)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or damaged: it is measured anew
            kept = json.loads(path.read_text())
            if kept.pop("key") == key:
                return Measured(**kept)
        print(f"timing the parts of a step: {variant.label}", flush=True)
        found = measure(config, steps)
        atomic.write_text(path, json.dumps({"key": key, **asdict(found)}, indent=2) + "\n")
        return found

    def plan(self) -> Report:
        """What compare.json holds before anything was run: costs by count."""
        counted = self.counted()
        runs: dict[str, Any] = {}
        for variant in self.variants:
            of = counted[variant.name]
            runs[variant.name] = {
                "label": variant.label,
                "networks": variant.config.names(),
                "subnets_per_step": None if variant.alone else variant.config.subnets_per_step,
                "counted": {"views": of.views, **of.parts(), "online_by_network": of.online},
            }
        return {
            "protocol": "compare",
            "data": self.recipe.data,
            "train_images": self.images,
            "test_images": self.size.test,
            "steps": self.steps,
            "seeds": self.seeds,
            "recipe": {name: value for name, value in asdict(self.recipe).items() if name not in DECIDED},
            "networks": {dn: {"parameters": of.parameters, "macs": of.macs} for dn, of in self.costs.items()},
            "accuracy": {},
            "runs": runs,
            "ratios": ratios(runs),
        }

    def _report(self, accuracies: Mapping[str, Mapping[int, Any]], measured: Mapping[str, Measured]) -> Report:
        report = self.plan()
        for variant in self.trained:
            report["runs"][variant.name]["measured"] = self._measured(variant, measured[variant.name])
        for protocol in accuracies[self.trained[0].name][self.seeds[0]]:
            found = {
                v.name: {dn: _over_seeds(accuracies[v.name], protocol, dn) for dn in v.config.names()}
                for v in self.trained
            }
            alone = {dn: score for v in self.alone if v.name in found for dn, score in found[v.name].items()}
            families = {v.name: found[v.name] for v in self.families}
            report["accuracy"][protocol] = {**({ALONE: alone} if alone else {}), **families}
        report["ratios"] = ratios(report["runs"])
        return report

    def _measured(self, variant: Variant, found: Measured) -> dict[str, Any]:
        """Seconds of training of every seed's run, and their mean in parts.

        The wait for data is what the runs recorded. What remains is divided as the timed parts of a step, times the
        steps that each was taken in, are to each other.
        """
        timed = {
            "target": self.steps * found.target,
            "online": sum(
                steps * found.online[dn]
                for dn, steps in counting.sampled_steps(variant.config, self.epoch_steps).items()
            ),
            "optimizer": self.steps * found.optimizer,
        }
        taken = {seed: seconds_of(self.place(variant, seed), self.recipe.batch_size) for seed in self.seeds}
        seconds = summary([total for total, _ in taken.values()])
        data = statistics.fmean(waited for _, waited in taken.values())
        scale = (seconds["mean"] - data) / sum(timed.values())
        return {
            "seconds": {**seconds, "seeds": {str(seed): total for seed, (total, _) in taken.items()}},
            "parts": {**{part: scale * value for part, value in timed.items()}, "data": data},
            "timed_step": {"target": found.target, "online": found.online, "optimizer": found.optimizer},
            "explained": 1 / scale,
            "peak_memory": found.peak_memory,
        }


def seconds_of(out: Path, batch_size: int) -> tuple[float, float]:
    """Seconds of training of a run, and of them those that it waited for data, from its metrics.

    Measurements and checkpoints do not count, nor does what was done twice after a crash.
    """
    total = waited = 0.0
    before = 0
    for line in read_metrics(out):
        if "images_per_second" in line:
            took = (line["step"] - before) * batch_size / line["images_per_second"]
            total += took
            waited += took * line["data_wait"]
            before = line["step"]
    return total, waited


def summary(values: Iterable[float]) -> dict[str, float]:
    """Mean and range."""
    values = list(values)
    return {"mean": statistics.fmean(values), "low": min(values), "high": max(values)}


def _accuracies(report: Report, column: str, accuracy: str) -> dict[str, dict[str, float]]:
    return {
        name: {"accuracy": network[column][accuracy], "interval": network[column]["interval"]}
        for name, network in report["networks"].items()
    }


def _over_seeds(by_seed: Mapping[int, Any], protocol: str, dn: str) -> dict[str, Any]:
    """Mean and range over the seeds, with the mean half-width of the 95 % interval that each has."""
    found = {seed: scores[protocol][dn] for seed, scores in by_seed.items()}
    return {
        **summary(score["accuracy"] for score in found.values()),
        "interval": statistics.fmean(score["interval"] for score in found.values()),
        "seeds": {str(seed): score for seed, score in found.items()},
    }


def _numbers(name: str, value: int | str, least: int) -> list[int]:
    """A list such as 2,3,4, in ascending order; InputError if it is none."""
    try:
        found = sorted(int(part) for part in str(value).split(","))
    except ValueError as error:
        raise InputError(f"{flag(name)} is a number or several, such as 2,3,4, not {value!r}") from error
    if found[0] < least or len(set(found)) < len(found):
        raise InputError(f"{flag(name)} {value}: give different numbers from {least} on")
    return found
