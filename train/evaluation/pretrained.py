"""Families loaded from run directories: the base class, and pretrained families."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dspnet_fast.errors import InputError
from dspnet_fast.models import Network, build, image_channels
from dspnet_fast.nn import activate
from dspnet_fast.statistics import load_statistics, measured_statistics, post_statistics
from dspnet_fast.subnets import Family, Subnet
from dspnet_fast.tensor_file import write_tensors
from dspnet_fast.weight_file import load_state

from ..config import PretrainConfig
from ..costs.flops import NetworkCost, network_cost
from ..data.datasets.images import ImageDataset, Subset, dataset_digest
from ..data.loader import evaluation_batches
from ..data.normalization import prepare
from ..distributed.process_group import SINGLE_PROCESS, World
from ..pretraining.dspnet import build_model
from ..run import checkpoint, fingerprint
from ..run.options import Workers
from ..run.progress import Monitor
from ..run.saved_config import read_config
from .features import last_map, load_or_compute, representations

BATCH = 256  # images per forward pass
STATISTICS = "post_statistics.safetensors"
STATISTICS_IMAGES = 10_000  # images that post-statistics are measured on, at most
FEATURES = "features"

StatisticsSource = dict[str, Any]  # step, weights, data, images, files and size that statistics were measured on


def evaluation_views(
    images: ImageDataset,
    image_size: int,
    device: torch.device,
    name: str,
    workers: Workers = "auto",
    start: int = 0,
    world: World = SINGLE_PROCESS,
) -> Iterator[Tensor]:
    """Load deterministic, normalised views of images, with a progress bar on rank 0.

    Args:
        images: dataset.
        image_size: height and width of the views, in pixels.
        device: device of the views.
        name: name of the work on the progress bar.
        workers: number of loader processes.
        start: index of the first image, a multiple of BATCH.
        world: the ranks; rank r of R loads batches r, r + R, r + 2 R, ... from `start` on.

    Yields:
        Batches [<= BATCH, C, image_size, image_size] in float32.
    """
    firsts = range(start + world.rank * BATCH, len(images), world.size * BATCH)
    indices = [i for first in firsts for i in range(first, min(first + BATCH, len(images)))]
    loader = evaluation_batches(images, indices, image_size, BATCH, workers)
    done = start // BATCH // world.size
    with Monitor(name, done + len(firsts), done) as monitor:
        for batch in loader:
            yield prepare(batch, device)
            monitor.advance()
            monitor.status(f"{monitor.done / monitor.steps:.0%}")


def statistics_images(images: ImageDataset) -> ImageDataset:
    """The images that post-statistics are measured on, drawn with a fixed seed so that all commands agree."""
    return Subset.up_to(STATISTICS_IMAGES, images)


class EvaluatedFamily:
    """A family with the weights and post-statistics of a run directory.

    Attributes:
        out: run directory.
        device: device of the model.
        family: subnets of the model.
        model: slimmable network, from images to features or logits, in evaluation mode.
        image_size: height and width of images, in pixels.
        step: number of training steps of the weights.
        world: the ranks that share the computation of features.
        classes: names of the classes, in the order of the logits; empty without a classifier.
    """

    world = SINGLE_PROCESS
    classes: list[str] = []  # noqa: RUF012  (replaced, never changed)

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

    def batches(self, images: ImageDataset, name: str, workers: Workers = "auto", start: int = 0) -> Iterator[Tensor]:
        """Views of images for this model: see `evaluation_views`."""
        return evaluation_views(images, self.image_size, self.device, name, workers, start)

    @torch.no_grad()
    def map_shape(self, subnet: Subnet) -> tuple[int, int, int]:
        """Channels, height and width of the feature map before the pooling, of a subnet with post-statistics.

        Raises:
            InputError: the network has no such map.
        """
        images = torch.zeros(1, image_channels(self.model), self.image_size, self.image_size, device=self.device)
        with activate(self.model, subnet):
            _, channels, height, width = last_map(self.model, images).shape
        return channels, height, width

    def features(
        self, subnets: Sequence[Subnet], images: ImageDataset, name: str, workers: Workers = "auto", maps: bool = False
    ) -> dict[str, Tensor]:
        """Compute features of all images, or load them from OUT/features.

        The file names contain a digest of weights, statistics and images. Interrupted computations continue.

        Args:
            subnets: subnets with post-statistics.
            images: dataset.
            name: name of the work on the progress bar.
            workers: number of loader processes.
            maps: compute the feature maps before the pooling.

        Returns:
            Features [N, F] by subnet, in float32 on the CPU; of maps [N, F * h * w], see `map_shape`.
        """
        by_name = {subnet.name: subnet for subnet in subnets}
        files_key = dataset_digest(images)
        files, shapes = {}, {}
        for dn, subnet in by_name.items():
            statistics = [part for item in sorted(measured_statistics(self.model, [subnet]).items()) for part in item]
            key = fingerprint.digest(self.weights, self.image_size, files_key, *statistics)
            files[dn] = self.out / FEATURES / f"{dn}-{'map-' if maps else ''}{key}.npy"
            shapes[dn] = (len(images), math.prod(self.map_shape(subnet)) if maps else subnet.channels[-1])

        def compute(dns: list[str], start: int) -> Iterable[dict[str, Tensor]]:
            batches = evaluation_views(images, self.image_size, self.device, name, workers, start, self.world)
            parts = representations(self.model, [by_name[dn] for dn in dns], batches, maps)
            on_cpu = ({dn: rows.cpu() for dn, rows in part.items()} for part in parts)
            return self.world.gather_in_order(on_cpu, -(-(len(images) - start) // BATCH))

        return load_or_compute(files, shapes, BATCH, compute, self.world)

    def measure_statistics(
        self, subnets: Sequence[Subnet], images: ImageDataset, data: str, workers: Workers = "auto", prefix: str = ""
    ) -> None:
        """Measure post-statistics of subnets on up to 10,000 images, on rank 0, which sends them to the others.

        Statistics of a trained family are saved in the run directory, and reused for the same weights and images.

        Args:
            subnets: subnets of the family.
            images: dataset.
            data: name of the dataset.
            workers: number of loader processes.
            prefix: first part of the name on the progress bar.
        """
        if self.world.is_main:
            self._measure_statistics(subnets, images, data, workers, prefix)
        if self.world.size > 1:
            measured = {n: tensor.cpu() for n, tensor in measured_statistics(self.model, subnets).items()}
            load_statistics(self.model, subnets, self.world.all_gather(measured)[0])

    def _measure_statistics(
        self, subnets: Sequence[Subnet], images: ImageDataset, data: str, workers: Workers, prefix: str
    ) -> None:
        drawn = statistics_images(images)
        source = {
            "step": self.step,
            "weights": self.weights,
            "data": data,
            "images": len(drawn),
            "files": dataset_digest(drawn),
            "size": self.image_size,
        }
        before = self.restore_statistics(subnets) if self.step else {}
        missing = [subnet for subnet in subnets if before.get(subnet.name) != source]
        if not missing:
            return
        post_statistics(self.model, missing, self.batches(drawn, f"{prefix}statistics", workers))
        if self.step == 0:
            return
        sources, tensors = self._saved_statistics()
        sources |= {subnet.name: source for subnet in missing}
        tensors |= {
            name: tensor.cpu().contiguous() for name, tensor in measured_statistics(self.model, missing).items()
        }
        load_statistics(self.model, subnets, tensors)  # post_statistics has dropped those of all other subnets
        metadata = {"sources": json.dumps(sources)}
        write_tensors(self.out / STATISTICS, tensors, metadata)

    def restore_statistics(self, subnets: Sequence[Subnet]) -> dict[str, StatisticsSource]:
        """Load saved post-statistics of `subnets` into the model; returns the sources of those that exist."""
        sources, tensors = self._saved_statistics()
        load_statistics(self.model, subnets, tensors)
        return {subnet.name: sources[subnet.name] for subnet in subnets if subnet.name in sources}

    def _saved_statistics(self) -> tuple[dict[str, StatisticsSource], dict[str, Tensor]]:
        """Sources by subnet, and tensors, of saved statistics of these weights."""
        try:
            with safe_open(self.out / STATISTICS, "pt") as file:
                sources = json.loads(file.metadata()["sources"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            return {}, {}  # missing or damaged: they are measured again
        sources = {dn: source for dn, source in sources.items() if source.get("weights") == self.weights}
        return sources, {name: tensor for name, tensor in tensors.items() if name.split("/")[0] in sources}


class PretrainedFamily(EvaluatedFamily):
    """The online encoder of a pretraining run at its newest checkpoint.

    Args:
        out: run directory.
        device: device of the model.
        untrained: use the initial weights of the run instead of a checkpoint.
        world: the ranks that share the computation of features.
        part: "online", or "target" for the moving average of the weights.

    Attributes:
        config: configuration of the run.
        encoder: slimmable network.

    Raises:
        InputError: if the run or its checkpoint cannot be used.
    """

    def __init__(
        self,
        out: Path,
        device: torch.device,
        untrained: bool = False,
        world: World = SINGLE_PROCESS,
        part: str = "online",
    ) -> None:
        if part not in ("online", "target"):
            raise InputError(f"--network-part must be online or target, not {part!r}")
        self.world, self.part = world, part
        self.config: PretrainConfig = read_config(out, PretrainConfig)
        model = build_model(self.config)
        step = 0
        if not untrained:
            state = checkpoint.load_of_run(out, "cpu", print)
            load_state(model, state["model"])
            step = state["step"]
        self.encoder = model.online.encoder
        if part == "target":
            weights = dict(model.target.encoder.named_parameters())
            load_state(self.encoder, {n: weights.get(n, value) for n, value in self.encoder.state_dict().items()})
        super().__init__(out, device, model.family, self.encoder, self.config.image_size, step)

    def cost(self, subnet: Subnet) -> NetworkCost:
        """Cost of a subnet."""
        return network_cost(self.config, subnet, self.image_size)

    def cut(self, subnet: Subnet) -> Network:
        """Copy `subnet` into a separate slimmable network on the CPU; InputError if the family does not contain it."""
        if not subnet.within(self.family.full):
            raise InputError(f"{subnet} is no part of {self.family.full}, the largest network of {self.out}")
        with torch.random.fork_rng(devices=[]):
            network = build(self.config.network, subnet, self.config.stem, self.config.in_channels)
        weights = dict(self.encoder.named_parameters())
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(weights[name][tuple(slice(size) for size in parameter.shape)])
        return network
