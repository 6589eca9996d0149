"""The networks of a run of any kind, with their post-statistics: for exports, features and teachers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from dspnet_fast import atomic
from dspnet_fast.errors import InputError
from dspnet_fast.models import family, subnet
from dspnet_fast.subnets import Subnet

from ..config import FinetuneConfig, PretrainConfig
from ..data.datasets import open_images
from ..data.datasets.images import ImageDataset
from ..data.datasets.pixels import PixelFormat
from ..data.pixel_options import read_as
from ..distributed.process_group import SINGLE_PROCESS, World
from ..run.run_directory import without_bad_images
from ..run.saved_config import read_any_config
from .finetuned import FinetunedFamily
from .pretrained import EvaluatedFamily, PretrainedFamily


class TrainedRun:
    """A run of dspnet-pretrain or dspnet-finetune.

    Args:
        out: run directory.

    Attributes:
        config: configuration of the run.
        options: options of its family.
        family: its subnets.
        data: name of its dataset.
        image_size: height and width of its images, in pixels.
        format: pixel format of its images.

    Raises:
        InputError: if `out` holds no such run.
    """

    def __init__(self, out: Path) -> None:
        config = read_any_config(out, PretrainConfig, FinetuneConfig)
        assert isinstance(config, PretrainConfig | FinetuneConfig)
        assert config.data is not None and config.image_size is not None
        self.out, self.config = out, config
        self.data, self.image_size, self.format = config.data, config.image_size, PixelFormat.of(config)
        self.options = config.family() if isinstance(config, FinetuneConfig) else config
        self._images: dict[str, ImageDataset] = {}
        self.family = family(self.options.network, self.options.names())

    def images(self, split: Literal["train", "test"] = "train") -> ImageDataset:
        """Training or test images in the pixel format of the run, without those that the pretraining left out."""
        if split not in self._images:
            unlabelled = isinstance(self.config, PretrainConfig) and self.config.unlabelled
            images = read_as(open_images(self.data, split, unlabelled=unlabelled), self.format)
            pretrained = Path(self.config.from_) if isinstance(self.config, FinetuneConfig) else self.out
            self._images[split] = without_bad_images(pretrained, images, self.data)
        return self._images[split]

    def subnets(self, dns: Sequence[str]) -> list[Subnet]:
        """Subnets by name, also such as the run did not train.

        Raises:
            InputError: if a subnet is not contained in the largest network of the run.
        """
        found = [subnet(self.options.network, dn) for dn in dns]
        for chosen in found:
            if not chosen.within(self.family.full):
                raise InputError(f"{chosen} is no part of {self.family.full}, the largest network of {self.out}")
        return found

    def load(self, subnets: Sequence[Subnet], world: World = SINGLE_PROCESS) -> EvaluatedFamily:
        """Load the family from the newest checkpoint, on the CPU, and measure post-statistics that the run lacks.

        Args:
            subnets: subnets that need post-statistics.
            world: the ranks, of which rank 0 measures.
        """
        kind = FinetunedFamily if isinstance(self.config, FinetuneConfig) else PretrainedFamily
        trained: EvaluatedFamily = kind(self.out, torch.device("cpu"))
        trained.world = world
        measured = trained.restore_statistics(subnets)
        missing = world.all_gather([chosen for chosen in subnets if chosen.name not in measured])[0]
        if missing:
            atomic.check_writable(self.out)
            trained.measure_statistics(missing, self.images(), self.data)
            trained.restore_statistics(subnets)  # measuring has dropped those of the other subnets
        return trained
