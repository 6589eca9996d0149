"""Options, model and data that all protocols share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from dspnet_fast.errors import InputError

from ...data.datasets import open_images
from ...data.datasets.images import ImageDataset, require_labels
from ...data.datasets.pixels import PixelFormat
from ...data.pixel_options import read_as
from ...distributed.process_group import init_sharing
from ...run.device import choose_device
from ...run.options import DEVICE_HELP, PLUGINS_HELP, WORKERS_HELP, Workers, count, flag, option
from ...run.run_directory import without_bad_images
from ...selection.kernels import use_kernels
from ...teachers.sources import FORMS
from ..pretrained import PretrainedFamily
from ..published import PublishedNetwork

FOLDER = "evaluation"
RUN = "run"


@dataclass(kw_only=True)
class EvaluationOptions:
    """data and execution"""

    data: str | None = option(
        None,
        "labelled images, as for dspnet-pretrain; needed with published --weights [those of the pretraining run]",
        metavar="IMAGES",
    )
    weights: str = option(
        RUN,
        f"networks to evaluate: run, those of the pretraining; or another: {FORMS}",
        metavar="WEIGHTS",
    )
    image_size: int | None = count(
        None, "with published --weights, height and width of the views in pixels [that of their training]"
    )
    network_part: str = option("online", "weights of a run: online, or target, their moving average", metavar="PART")
    workers: Workers = option("auto", WORKERS_HELP)
    device: str = option("auto", DEVICE_HELP, metavar="DEVICE")
    fast_kernels: bool = option(
        False, "compute the features of a run's networks by the kernels that are selected for it; see docs/selection.md"
    )
    plugins: str = option("", PLUGINS_HELP, metavar="MODULES")

    @property
    def published(self) -> bool:
        """Whether --weights names a published network."""
        return self.weights != RUN

    def check_weights(self) -> None:
        """Raise InputError for options that published networks need or do not have."""
        if not self.published:
            if self.image_size is not None:
                raise InputError("--image-size is for published --weights: the run's networks keep their image size")
            return
        if self.data is None:
            raise InputError(f"--data is missing: name the images to evaluate --weights {self.weights} on")
        for name, given in (("network_part", self.network_part != "online"), ("fast_kernels", self.fast_kernels)):
            if given:
                raise InputError(f"{flag(name)} is for the networks of a run: leave it out with --weights")


class EvaluationSetup:
    """A pretrained family, or a published network, and the labelled images to evaluate it on.

    Args:
        out: run directory.
        options: options of the protocol.
        trains: whether the protocol computes gradients of the networks.

    Attributes:
        world: the ranks that share the computation of features, until `end_sharing`.
        trained: the family, or the published network.
        data: name of the dataset.
        train: training split.
        test: test split.
        train_labels: int64 [number of training images].
        test_labels: int64 [number of test images].

    Raises:
        InputError: if the run or the images cannot be used.
    """

    def __init__(self, out: Path, options: EvaluationOptions, trains: bool = False) -> None:
        options.check_weights()
        self.world, device = init_sharing(choose_device(options.device))
        self.trained: PretrainedFamily | PublishedNetwork
        format = PixelFormat()
        if options.published:
            assert options.data is not None
            self.trained = PublishedNetwork(out, device, options.weights, options.image_size, self.world)
            self.data = options.data
            if self.trained.note:
                print(self.trained.note, flush=True)
        else:
            self.trained = PretrainedFamily(out, device, world=self.world, part=options.network_part)
            config = self.trained.config
            if options.fast_kernels:
                plugins = options.plugins or config.plugins
                use_kernels(device, config, config.image_size, out, tf32=config.tf32, plugins=plugins, trains=trains)
            self.data = options.data or config.data
            format = PixelFormat.of(config)
        self.open_splits(out, options, format)

    def open_splits(self, out: Path, options: EvaluationOptions, format: PixelFormat) -> None:
        """Open both splits, read in the run's pixel format."""
        self.train: ImageDataset = without_bad_images(out, read_as(open_images(self.data, "train"), format), self.data)
        self.test: ImageDataset = read_as(open_images(self.data, "test"), format)
        self.train_labels: Tensor = require_labels(self.train)
        self.test_labels: Tensor = require_labels(self.test)

    @property
    def origin(self) -> dict[str, Any]:
        """Entries of the report about the weights."""
        if isinstance(self.trained, PublishedNetwork):
            return {"weights": self.trained.source, "image_size": self.trained.image_size}
        part = {} if self.trained.part == "online" else {"network_part": self.trained.part}
        return {"step": self.trained.step, **part}

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.train.classes)

    @cached_property
    def networks(self) -> dict[str, dict[str, Any]]:
        """Parameters and multiply-accumulates by subnet, as a report starts."""
        costs = {subnet.name: self.trained.cost(subnet) for subnet in self.trained.family}
        return {name: {"parameters": cost.parameters, "macs": cost.macs} for name, cost in costs.items()}
