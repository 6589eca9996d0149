"""A family loaded from its run directory, ready to be evaluated: what runs have in common, and a pretrained one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dspnet_fast import atomic
from dspnet_fast.errors import InputError
from dspnet_fast.models import Network, build
from dspnet_fast.statistics import load_statistics, measured_statistics, post_statistics
from dspnet_fast.subnets import Family, Subnet

from ..config import PretrainConfig, Workers
from ..data.datasets.images import ImageDataset, Subset, dataset_digest
from ..data.loader import evaluation_batches
from ..data.normalization import normalize
from ..pretraining.dspnet import build_model
from ..run import checkpoint, fingerprint
from ..run.progress import Monitor
from ..run.saved_config import read_config
from .features import kept, representations

BATCH = 256
STATISTICS = "post_statistics.safetensors"
STATISTICS_IMAGES = 10_000
FEATURES = "features"

Source = dict[str, Any]  # of statistics: step, weights, data, images, size


def evaluation_views(
    images: ImageDataset, image_size: int, device: torch.device, what: str, workers: Workers = "auto", start: int = 0
) -> Iterator[Tensor]:
    """Views without chance of all images, normalised, on the device, with progress called `what`.

    They begin at image `start`, a multiple of BATCH.
    """
    loader = evaluation_batches(images, range(start, len(images)), image_size, BATCH, workers)
    with Monitor(what, -(-len(images) // BATCH), start // BATCH) as monitor:
        for batch in loader:
            yield normalize(batch.to(device, non_blocking=True))
            monitor.advance()
            monitor.status(f"{monitor.done / monitor.steps:.0%}")


def statistics_images(images: ImageDataset) -> ImageDataset:
    """Those that post-statistics are measured on, drawn with a fixed seed, so that every command has the same."""
    return Subset.random(images, min(STATISTICS_IMAGES, len(images)), seed=0)


class EvaluatedFamily:
    """A family with the weights that a run directory holds, and the post-statistics that are kept there.

    Attributes:
        out: the run directory.
        device: where the model is.
        family: its subnets.
        model: the slimmable network, of images to features or to logits, in evaluation mode.
        image_size: height and width of its images, in pixels.
        step: how many steps it was trained.
    """

    def __init__(
        self, out: Path, device: torch.device, family: Family, model: nn.Module, image_size: int, step: int
    ) -> None:
        self.out = out
        self.device = device
        self.family = family
        self.model = model.to(device).to(memory_format=torch.channels_last).eval()
        self.image_size = image_size
        self.step = step

    @cached_property
    def weights(self) -> str:
        """A digest of the model's parameters."""
        return fingerprint.digest(*self.model.parameters())

    def batches(self, images: ImageDataset, what: str, workers: Workers = "auto", start: int = 0) -> Iterator[Tensor]:
        """Evaluation views of the run's size on its device: see `evaluation_views`."""
        return evaluation_views(images, self.image_size, self.device, what, workers, start)

    def measure(
        self, subnets: Sequence[Subnet], images: ImageDataset, data: str, workers: Workers = "auto", what: str = ""
    ) -> None:
        """Give `subnets` post-statistics measured on 10,000 images (all if there are fewer) of the set called `data`.

        A trained family keeps them in the run directory: those measured before on the same images are used again.
        """
        drawn = statistics_images(images)
        source = {
            "step": self.step,
            "weights": self.weights,
            "data": data,
            "images": len(drawn),
            "files": dataset_digest(drawn),
            "size": self.image_size,
        }
        before = self.recall(subnets) if self.step else {}
        missing = [subnet for subnet in subnets if before.get(subnet.name) != source]
        if not missing:
            return
        post_statistics(self.model, missing, self.batches(drawn, f"{what}statistics", workers))
        if self.step == 0:
            return
        sources, tensors = self._kept()
        sources |= {subnet.name: source for subnet in missing}
        tensors |= {
            name: tensor.cpu().contiguous() for name, tensor in measured_statistics(self.model, missing).items()
        }
        load_statistics(self.model, subnets, tensors)  # measuring some makes the model forget all others
        metadata = {"sources": json.dumps(sources)}
        atomic.write_atomically(self.out / STATISTICS, lambda path: save_file(tensors, path, metadata=metadata))

    def recall(self, subnets: Sequence[Subnet]) -> dict[str, Source]:
        """Take over the kept statistics of `subnets`; says what they were measured on, for those that there are."""
        sources, tensors = self._kept()
        load_statistics(self.model, subnets, tensors)
        return {subnet.name: sources[subnet.name] for subnet in subnets if subnet.name in sources}

    def _kept(self) -> tuple[dict[str, Source], dict[str, Tensor]]:
        """Statistics of these weights in the run directory, and what each subnet's were measured on."""
        try:
            with safe_open(self.out / STATISTICS, "pt") as file:
                sources = json.loads(file.metadata()["sources"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            return {}, {}  # none or damaged: they can be measured again
        sources = {dn: source for dn, source in sources.items() if source.get("weights") == self.weights}
        return sources, {name: tensor for name, tensor in tensors.items() if name.split("/")[0] in sources}


class PretrainedFamily(EvaluatedFamily):
    """The online encoder of a run at its newest checkpoint, or with `untrained` as it was before its first step.

    Attributes:
        config: the run's configuration.
        encoder: the slimmable network.
    """

    def __init__(self, out: Path, device: torch.device, untrained: bool = False) -> None:
        self.config: PretrainConfig = read_config(out, PretrainConfig)
        model = build_model(self.config)
        step = 0
        if not untrained:
            state = checkpoint.load_of_run(out, "cpu", print)
            model.load_state_dict(state["model"])
            step = state["step"]
        self.encoder = model.online.encoder
        super().__init__(out, device, model.family, self.encoder, self.config.image_size, step)

    def cut(self, subnet: Subnet) -> Network:
        """A slimmable network of its own, on the CPU, that has the weights of `subnet`; InputError if it is no part."""
        if not subnet.within(self.family.full):
            raise InputError(f"{subnet} is no part of {self.family.full}, the largest network of {self.out}")
        with torch.random.fork_rng(devices=[]):
            network = build(self.config.network, subnet, self.config.stem)
        weights = dict(self.encoder.named_parameters())
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(weights[name][tuple(slice(size) for size in parameter.shape)])
        return network

    def features(
        self, subnets: Sequence[Subnet], images: ImageDataset, what: str, workers: Workers = "auto"
    ) -> dict[str, Tensor]:
        """Features [N, F] in float32 of the evaluation views of all images, by subnet, on the CPU; called `what`.

        They are kept in OUT/features, under what they depend on; computing them goes on where it was interrupted.
        """
        by_name = {subnet.name: subnet for subnet in subnets}
        files_key = dataset_digest(images)
        files, shapes = {}, {}
        for name, subnet in by_name.items():
            statistics = [part for item in sorted(measured_statistics(self.encoder, [subnet]).items()) for part in item]
            key = fingerprint.digest(self.weights, self.config.image_size, files_key, *statistics)
            files[name] = self.out / FEATURES / f"{name}-{key}.npy"
            shapes[name] = (len(images), subnet.channels[-1])

        def compute(names: list[str], start: int) -> Iterable[dict[str, Tensor]]:
            batches = self.batches(images, what, workers, start)
            return representations(self.encoder, [by_name[name] for name in names], batches)

        return kept(files, shapes, BATCH, compute)
