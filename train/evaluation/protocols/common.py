"""What every protocol is told and what it is about."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from dspnet_fast.ops import registry

from ...config import WORKERS_HELP, Workers, option
from ...costs.flops import cost
from ...data.datasets import open_images
from ...data.datasets.images import ImageDataset, require_labels
from ...run.device import choose_device
from ..pretrained import PretrainedFamily

FOLDER = "evaluation"


@dataclass(kw_only=True)
class EvaluationOptions:
    """data and execution"""

    data: str | None = option(None, "set of images with labels [the one that the run was pretrained on]")
    workers: Workers = option("auto", WORKERS_HELP)
    device: str = option("auto", "auto, cpu or cuda")
    fast_kernels: bool = option(False, "use the fastest operator provider this machine has")


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
        self.train: ImageDataset = open_images(self.data, "train")
        self.test: ImageDataset = open_images(self.data, "test")
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
