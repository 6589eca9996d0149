"""Design of a comparison: its options, its runs, and their counted costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dspnet_fast.errors import InputError
from dspnet_fast.models import family as family_of

from ..config import PretrainConfig
from ..costs import flops
from ..costs.dry_run import images_of
from ..data.datasets import dataset_size
from ..data.sampler import EpochSampler
from ..evaluation.results import Report
from ..pretraining import recipe
from ..run.options import check_options, count, flag, not_negative, option
from ..teachers.teacher import expected_facts, with_teacher, without_teacher
from .ratios import ratios

RUNS = "runs"
SET_BY_COMPARISON = ("out", "seed", "subnets_per_step", "init_from")  # options of runs that the comparison sets itself


@dataclass(kw_only=True)
class CompareOptions:
    """comparison"""

    out: str = option("", "folder for the runs and the results", metavar="DIR")
    seeds: int | str = option(
        0, "seeds, such as 0,1,2; every network and family is trained once with each", metavar="SEEDS"
    )
    subnets_per_step: int | str = option(
        4, "subnets per step; several numbers, such as 2,3,4,5, train a family with each", metavar="NUMBERS"
    )
    no_separate_runs: bool = option(
        False, "train families only, and count the cost of separate runs without training them"
    )
    separate: str | None = option(
        None, "networks to pretrain alone, such as w1.00; of the others only the cost is counted [all]", metavar="NAMES"
    )
    k: int = count(20, "number of neighbours that vote in the kNN evaluation")
    references: int | None = option(None, "training images to search neighbours among, drawn at random [all]")
    linear_epochs: int = not_negative(0, "epochs of linear classifiers for linear evaluation; 0: none")
    timed_steps: int = count(5, "training steps to time, of each network alone and of each family")


@dataclass(frozen=True)
class Variant:
    """A run without its seed: a network alone, or the family with a number of subnets per step.

    With a teacher there are runs of the family with it and by itself, without it.
    """

    name: str
    label: str
    config: PretrainConfig
    alone: bool


class Comparison:
    """Runs of a comparison and their costs.

    Args:
        options: options of the comparison.
        config: configuration of all runs; the comparison replaces the options in `SET_BY_COMPARISON`.

    Attributes:
        variants: networks alone, smallest first, then families; with a teacher, families by themselves before these.
        trained: the variants that are trained.
        teacher: facts of the teacher; None without one.
        costs: costs of the networks by name.
        images: number of training images.
        choices: values that the recipe chose for all runs.

    Raises:
        InputError: if the options are invalid or the family has fewer than two networks.
    """

    def __init__(self, options: CompareOptions, config: PretrainConfig) -> None:
        check_options(options)
        self.teacher = expected_facts(config)
        config = with_teacher(config, self.teacher)
        self.options, self.config = options, config
        self.out = Path(options.out)
        self.family = family_of(config.network, config.names())
        if len(self.family) < 2:
            raise InputError("a comparison needs a family: give --dns two networks or more")
        self.seeds = _numbers("seeds", options.seeds, 0)
        sampled = _numbers("subnets_per_step", options.subnets_per_step, 2)
        for low, high in zip(sampled, sampled[1:], strict=False):
            if low >= len(self.family):
                raise InputError(
                    f"--subnets-per-step {low} and {high} have the same effect on {len(self.family)} networks"
                )
        self.size = dataset_size(config.data)
        self.images = images_of(config, self.size)
        self.choices = recipe.chosen(config, self.images)
        self.config = config = recipe.complete(config, self.images)
        taught = "" if self.teacher is None else " with teacher"
        self.alone = [
            Variant(dn, f"{dn} alone{taught}", replace(config, dns=dn), alone=True) for dn in self.family.names
        ]
        dns = ",".join(self.family.names)
        configs = {n: replace(config, dns=dns, subnets_per_step=n) for n in sampled}
        self.families = [
            Variant(f"family-n{n}", f"family, n = {n}{taught}", of_n, alone=False) for n, of_n in configs.items()
        ]
        if self.teacher is not None:
            self.families[:0] = [
                Variant(f"family-n{n}-itself", f"family by itself, n = {n}", without_teacher(of_n), alone=False)
                for n, of_n in configs.items()
            ]
        self.variants = [*self.alone, *self.families]
        self.trained = [*self._trained_alone(), *self.families]
        self.costs = flops.network_costs(config)
        references = self.size.train if options.references is None else options.references
        if not options.k <= references <= self.size.train:
            raise InputError(
                f"--k {options.k} neighbours among --references {references} of {self.size.train} images of "
                f"{config.data}: neither can exceed the number of images"
            )
        for variant, seed in ((v, s) for v in self.families for s in self.seeds):
            if variant.config.subnets_per_step > 2:  # with 2 the networks between are only evaluated, an ablation
                recipe.check_sampling(replace(variant.config, seed=seed), self.images)
        self.epoch_steps = EpochSampler(self.images, config.batch_size, 0, config.epochs).steps_per_epoch

    def _trained_alone(self) -> list[Variant]:
        if self.options.separate is None:
            return [] if self.options.no_separate_runs else self.alone
        if self.options.no_separate_runs:
            raise InputError("--separate and --no-separate-runs exclude each other: give one of them")
        names = {self.family.find(name.strip()).name for name in self.options.separate.split(",")}
        return [variant for variant in self.alone if variant.name in names]

    @property
    def steps(self) -> int:
        """Number of steps of every run."""
        return self.config.epochs * self.epoch_steps

    def run_costs(self) -> dict[str, flops.RunCost]:
        """Counted costs of a run of each variant."""
        return {
            v.name: flops.run_cost(v.config, self.epoch_steps, self.costs, self._teacher_cost(v.config))
            for v in self.variants
        }

    def _teacher_cost(self, config: PretrainConfig) -> flops.TeacherCost | None:
        if self.teacher is None or config.teacher is None:
            return None
        return self.teacher.cost(config, self.images)

    def run_directory(self, variant: Variant, seed: int) -> Path:
        """The directory of a run."""
        return self.out / RUNS / f"{variant.name}-seed{seed}"

    def initial_report(self) -> Report:
        """The report before any run: counted costs, without accuracies and times."""
        costs = self.run_costs()
        runs: dict[str, Any] = {}
        for variant in self.variants:
            cost = costs[variant.name]
            runs[variant.name] = {
                "label": variant.label,
                "networks": variant.config.names(),
                "subnets_per_step": None if variant.alone else variant.config.subnets_per_step,
                "counted": {"views": cost.views, **cost.parts(), "online_by_network": cost.online},
            }
        return {
            "protocol": "compare",
            "data": self.config.data,
            "train_images": self.images,
            "test_images": self.size.test,
            "steps": self.steps,
            "seeds": self.seeds,
            "config": {name: value for name, value in asdict(self.config).items() if name not in SET_BY_COMPARISON},
            "networks": {dn: {"parameters": cost.parameters, "macs": cost.macs} for dn, cost in self.costs.items()},
            "accuracy": {},
            "runs": runs,
            "ratios": ratios(runs),
        }


def _numbers(name: str, value: int | str, least: int) -> list[int]:
    """Parse numbers such as 2,3,4 into an ascending list; InputError if one is below `least` or repeated."""
    try:
        found = sorted(int(part) for part in str(value).split(","))
    except ValueError as error:
        raise InputError(f"{flag(name)} must be a number or several, such as 2,3,4, not {value!r}") from error
    if found[0] < least or len(set(found)) < len(found):
        raise InputError(f"{flag(name)} {value}: give different numbers of at least {least}")
    return found
