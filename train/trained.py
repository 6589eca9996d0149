"""A pretrained family, loaded from its run directory and ready to be evaluated."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dspnet_fast.statistics import load_statistics, measured_statistics, post_statistics
from dspnet_fast.subnets import Family, Subnet

from . import atomic, checkpoint
from .config import PretrainConfig
from .data.images import ImageSet
from .data.loader import Workers, evaluation_batches, normalize
from .progress import Monitor
from .rundir import read_config
from .trainer import build_model

BATCH = 256
STATISTICS = "post_statistics.safetensors"

Source = dict[str, Any]  # of statistics: step, data, images, size


class TrainedFamily:
    """The online encoder of a run at its newest checkpoint, or with `untrained` as it was before its first step.

    Attributes:
        config: the run's configuration.
        family: its subnets.
        encoder: the slimmable network.
        step: how many steps it was trained.
    """

    def __init__(self, out: Path, device: torch.device, untrained: bool = False) -> None:
        self.out = out
        self.device = device
        self.config: PretrainConfig = read_config(out)
        model = build_model(self.config)
        self.step = 0
        if not untrained:
            state = checkpoint.load(checkpoint.newest_of_run(out))
            model.load_state_dict(state["model"])
            self.step = state["step"]
        self.family: Family = model.family
        self.encoder = model.online.encoder.to(device).to(memory_format=torch.channels_last).eval()

    def batches(self, images: ImageSet, what: str, workers: Workers = "auto") -> Iterator[Tensor]:
        """Evaluation views of all images, normalised, on the device, with progress called `what`."""
        loader = evaluation_batches(images, range(len(images)), self.config.image_size, BATCH, workers)
        with Monitor(what, -(-len(images) // BATCH)) as monitor:
            for batch in loader:
                yield normalize(batch.to(self.device, non_blocking=True))
                monitor.advance()
                monitor.status(f"{monitor.done / monitor.steps:.0%}")

    def measure(self, subnets: Sequence[Subnet], images: ImageSet, data: str, workers: Workers = "auto") -> None:
        """Measure the post-statistics of `subnets` on `images` of the set called `data`.

        A trained family keeps them in the run directory.
        """
        post_statistics(self.encoder, subnets, self.batches(images, "statistics", workers))
        if self.step == 0:
            return
        sources, tensors = self._kept()
        source = {"step": self.step, "data": data, "images": len(images), "size": self.config.image_size}
        sources |= {subnet.name: source for subnet in subnets}
        tensors |= {
            name: tensor.cpu().contiguous() for name, tensor in measured_statistics(self.encoder, subnets).items()
        }
        metadata = {"sources": json.dumps(sources)}
        atomic.write_atomically(self.out / STATISTICS, lambda path: save_file(tensors, path, metadata=metadata))

    def recall(self, subnets: Sequence[Subnet]) -> dict[str, Source]:
        """Take over the kept statistics of `subnets`; says what they were measured on, for those that there are."""
        sources, tensors = self._kept()
        load_statistics(self.encoder, subnets, tensors)
        return {subnet.name: sources[subnet.name] for subnet in subnets if subnet.name in sources}

    def _kept(self) -> tuple[dict[str, Source], dict[str, Tensor]]:
        """Statistics of this step in the run directory, and what each subnet's were measured on."""
        try:
            with safe_open(self.out / STATISTICS, "pt") as file:
                sources = json.loads(file.metadata()["sources"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            return {}, {}  # none or damaged: they can be measured again
        sources = {dn: source for dn, source in sources.items() if source["step"] == self.step}
        return sources, {name: tensor for name, tensor in tensors.items() if name.split("/")[0] in sources}
