"""A fine-tuned family, loaded from its run directory."""

from __future__ import annotations

from pathlib import Path

import torch

from dspnet_fast.errors import InputError
from dspnet_fast.models import Classifier, build
from dspnet_fast.models import family as family_of
from dspnet_fast.weight_file import load_state

from ..config import FinetuneConfig
from ..data.datasets import open_images
from ..run import checkpoint
from ..run.saved_config import read_config
from .pretrained import EvaluatedFamily


class FinetunedFamily(EvaluatedFamily):
    """The slimmable classifier of a fine-tuning run at its newest checkpoint.

    Args:
        out: run directory.
        device: device of the model.

    Attributes:
        config: configuration of the run.

    Raises:
        InputError: if the run or its checkpoint cannot be used.
    """

    def __init__(self, out: Path, device: torch.device) -> None:
        self.config: FinetuneConfig = read_config(out, FinetuneConfig)
        assert self.config.data is not None and self.config.image_size is not None
        options = self.config.family()
        family = family_of(options.network, options.names())
        self.classes = open_images(self.config.data, "train").classes
        state = checkpoint.load_of_run(out, "cpu", print)
        with torch.random.fork_rng(devices=[]):
            model = Classifier(
                build(options.network, family.full, options.stem, options.in_channels), len(self.classes)
            )
        try:
            load_state(model, state["model"])
        except (KeyError, RuntimeError) as error:
            raise InputError(
                f"the checkpoint in {out} is of another network, or has other classes than the {len(self.classes)} of "
                f"{self.config.data}: {str(error).splitlines()[-1].strip()}"
            ) from error
        super().__init__(out, device, family, model, self.config.image_size, state["step"])
