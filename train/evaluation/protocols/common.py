"""What every protocol is told, what it is about, and what it will cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspnet_fast.models import family
from dspnet_fast.ops import registry
from dspnet_fast.subnets import Family

from ...config import WORKERS_HELP, FamilyOptions, PretrainConfig, Workers, option
from ...costs.flops import Cost, cost
from ...data.datasets import SetSize, open_images, size_of
from ...data.images import ImageSet, require_labels
from ...run.device import choose_device
from ...run.run_directory import read_recipe
from ...run.tables import Table, quantity
from ..pretrained import STATISTICS_IMAGES, PretrainedFamily

FOLDER = "evaluation"


@dataclass(kw_only=True)
class EvaluationOptions:
    """data and execution"""

    data: str | None = option(None, "set of images with labels [the one that the run was pretrained on]")
    workers: Workers = option("auto", WORKERS_HELP)
    device: str = option("auto", "auto, cpu or cuda")
    fast_kernels: bool = option(False, "use the fastest operator provider this machine has")
    dry_run: bool = option(False, "build, check and say what it would cost; OUT may also be a recipe of train.pretrain")


class Subject:
    """A trained family with a labelled set of images to evaluate it on.

    Attributes:
        trained: the family; its subnets have post-statistics.
        data: the set's name.
        train, test: the splits.
        train_labels, test_labels: int64 [N].
    """

    def __init__(self, out: Path, options: EvaluationOptions) -> None:
        if options.fast_kernels:
            registry.fast_kernels()
        self.trained = PretrainedFamily(out, choose_device(options.device))
        self.data = options.data or self.trained.config.data
        self.train: ImageSet = open_images(self.data, "train")
        self.test: ImageSet = open_images(self.data, "test")
        self.train_labels: Tensor = require_labels(self.train)
        self.test_labels: Tensor = require_labels(self.test)

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self.train.classes)

    @cached_property
    def networks(self) -> dict[str, dict[str, Any]]:
        """Parameters and multiply-accumulates by subnet: where the networks of a report begin."""
        config = self.trained.config
        costs = {subnet.name: cost(config, subnet, config.image_size) for subnet in self.trained.family}
        return {name: {"parameters": of.parameters, "macs": of.macs} for name, of in costs.items()}


def plan_of(what: str, out: Path, data: str | None) -> Plan:
    """The plan of a protocol for a run or a recipe, before any work is added to it."""
    config = config_of(out)
    return Plan(what, config, config.image_size, data or config.data)


def config_of(out: Path) -> PretrainConfig:
    """Of the run in a folder, checked to have a readable checkpoint, or of a recipe that was not run yet."""
    if out.suffix in (".yaml", ".yml"):
        return read_recipe(out, PretrainConfig)
    return PretrainedFamily(out, torch.device("cpu")).config


class Plan:
    """What a protocol would do to a family, built and counted without doing it.

    Attributes:
        family: its networks.
        costs: of each, by name.
        size: of the set of images.
    """

    def __init__(self, what: str, options: FamilyOptions, image_size: int, data: str) -> None:
        self.what, self.image_size, self.data = what, image_size, data
        self.family: Family = family(options.network, options.names())
        self.costs: dict[str, Cost] = {s.name: cost(options, s, image_size) for s in self.family}
        self.size: SetSize = size_of(data)
        self._lines: list[str] = []
        self._work = 0.0

    @property
    def statistics_images(self) -> int:
        """Images that post-statistics are measured on."""
        return min(STATISTICS_IMAGES, self.size.train)

    def forward(self, images: float, networks: Iterable[str] | None = None) -> float:
        """Multiply-accumulates of `images` through each of the networks, by default all."""
        return images * sum(self.costs[name].macs for name in networks or self.costs)

    def add(self, what: str, macs: float, note: str = "") -> None:
        """A part of the work."""
        self._lines.append(f"{what:14}{quantity(macs)}MAC{'  ' + note if note else ''}")
        self._work += macs

    def note(self, what: str, text: str) -> None:
        """Something else worth knowing."""
        self._lines.append(f"{what:14}{text}")

    def show(self) -> None:
        """Print it."""
        rows = [
            [name, f"{cost.parameters:,}", f"{cost.macs / 1e6:,.1f} M", f"{cost.features:,}"]
            for name, cost in self.costs.items()
        ]
        where = "counted here" if self.size.here else "as published: not on this machine"
        size = self.size
        Table(f"{self.what}, {self.image_size} px", ["network", "params", "MACs", "features"], rows).show()
        print(
            f"{'images':14}{size.train:,} to train on, {size.test:,} to test, {size.classes:,} classes of {self.data}, "
            f"{where}"
        )
        for line in self._lines:
            print(line)
        print(f"{'together':14}{quantity(self._work)}MAC")
