"""What is compared: the options, the runs that it takes, and what they cost by count."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dspnet_fast.errors import InputError
from dspnet_fast.models import family as family_of

from ..config import PretrainConfig, flag, option
from ..costs import counting
from ..costs.dry_run import images_of
from ..data.datasets import dataset_size
from ..data.sampler import EpochSampler
from ..evaluation.results import Report
from .ratios import ratios

RUNS = "runs"
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
        self.size = dataset_size(recipe.data)
        self.images = images_of(recipe, self.size)
        references = self.size.train if options.references is None else options.references
        if not options.k <= references <= self.size.train:
            raise InputError(
                f"--k {options.k} neighbours among --references {references} of {self.size.train} images of "
                f"{recipe.data}: neither can be more than there are"
            )
        self.epoch_steps = EpochSampler(self.images, recipe.batch_size, 0, recipe.epochs).steps_per_epoch

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

    def place(self, variant: Variant, seed: int) -> Path:
        """The directory of a run."""
        return self.out / RUNS / f"{variant.name}-seed{seed}"

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


def _numbers(name: str, value: int | str, least: int) -> list[int]:
    """A list such as 2,3,4, in ascending order; InputError if it is none."""
    try:
        found = sorted(int(part) for part in str(value).split(","))
    except ValueError as error:
        raise InputError(f"{flag(name)} is a number or several, such as 2,3,4, not {value!r}") from error
    if found[0] < least or len(set(found)) < len(found):
        raise InputError(f"{flag(name)} {value}: give different numbers from {least} on")
    return found
