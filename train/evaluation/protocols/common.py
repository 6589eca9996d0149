"""Options, model and data that all protocols share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ...costs.flops import network_cost
from ...data.datasets import open_images
from ...data.datasets.images import ImageDataset, require_labels
from ...data.datasets.pixels import PixelFormat
from ...data.pixel_options import read_as
from ...distributed.process_group import init_sharing
from ...run.device import choose_device
from ...run.options import DEVICE_HELP, FAST_KERNELS_HELP, PLUGINS_HELP, WORKERS_HELP, Workers, option
from ...selection.kernels import use_kernels
from ..pretrained import PretrainedFamily

FOLDER = "evaluation"


@dataclass(kw_only=True)
class EvaluationOptions:
    """data and execution"""

    data: str | None = option(None, "labelled images [those of the pretraining run]", metavar="IMAGES")
    network_part: str = option("online", "weights to evaluate: online, or target, their moving average", metavar="PART")
    workers: Workers = option("auto", WORKERS_HELP)
    device: str = option("auto", DEVICE_HELP, metavar="DEVICE")
    fast_kernels: bool = option(False, FAST_KERNELS_HELP)
    plugins: str = option("", PLUGINS_HELP, metavar="MODULES")


class EvaluationSetup:
    """A pretrained family and the labelled images to evaluate it on.

    Args:
        out: run directory.
        options: options of the protocol.
        trains: whether the protocol computes gradients of the networks.

    Attributes:
        world: the ranks that share the computation of features, until `end_sharing`.
        trained: the family.
        data: name of the dataset.
        train: training split.
        test: test split.
        train_labels: int64 [number of training images].
        test_labels: int64 [number of test images].

    Raises:
        InputError: if the run or the images cannot be used.
    """

    def __init__(self, out: Path, options: EvaluationOptions, trains: bool = False) -> None:
        self.world, device = init_sharing(choose_device(options.device))
        self.trained = PretrainedFamily(out, device, world=self.world, part=options.network_part)
        if options.fast_kernels:
            config = self.trained.config
            plugins = options.plugins or config.plugins
            use_kernels(device, config, config.image_size, out, tf32=config.tf32, plugins=plugins, trains=trains)
        self.data = options.data or self.trained.config.data
        format = PixelFormat.of(self.trained.config)
        self.train: ImageDataset = read_as(open_images(self.data, "train"), format)
        self.test: ImageDataset = read_as(open_images(self.data, "test"), format)
        self.train_labels: Tensor = require_labels(self.train)
        self.test_labels: Tensor = require_labels(self.test)

    @property
    def part(self) -> dict[str, str]:
        """An entry of the report for target weights; none for online weights."""
        return {} if self.trained.part == "online" else {"network_part": self.trained.part}

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.train.classes)

    @cached_property
    def networks(self) -> dict[str, dict[str, Any]]:
        """Parameters and multiply-accumulates by subnet, as a report starts."""
        config = self.trained.config
        costs = {subnet.name: network_cost(config, subnet, config.image_size) for subnet in self.trained.family}
        return {name: {"parameters": cost.parameters, "macs": cost.macs} for name, cost in costs.items()}
