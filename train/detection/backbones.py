"""Networks that detectors are trained on: of a run, with random weights, or of timm and torchvision."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dspnet_fast import exported
from dspnet_fast.errors import InputError, first_line
from dspnet_fast.models import Network, build, subnet
from dspnet_fast.slim import slim
from dspnet_fast.weight_file import SORTED, load_state, read_weights

from ..config import PretrainConfig
from ..data.datasets.pixels import PixelFormat
from ..data.normalization import MEAN, STD
from ..evaluation.pretrained import PretrainedFamily
from ..run import checkpoint
from ..run.saved_config import read_config
from ..teachers.sources import published_name, timm_config
from ..teachers.weights import match

STRIDES = 4, 8, 16, 32
RANDOM = "random"
CLASSIFIERS = ("classifier", "fc", "heads", "head")  # of torchvision's networks


@dataclass
class Backbone:
    """A network that gives feature maps.

    Attributes:
        network: has `map_channels`, the channels of its maps, and `feature_maps`, which computes those of an image.
        name: of the result files.
        source: description of the weights' origin.
        mean, std: normalisation of RGB images from 0 to 1.
    """

    network: Network | FeatureMaps
    name: str
    source: str
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


def open_backbone(weights: str, out: Path, dn: str | None, seed: int) -> Backbone:
    """Load the network of a detector.

    Args:
        weights: "run", "random", `timm:NAME[=FILE]` or `torchvision:NAME[=FILE]`.
        out: run directory of the pretraining, for the first two.
        dn: name of the run's network, for the first two.
        seed: seed of random weights.

    Raises:
        InputError: there is no such run, network or file, or it does not take RGB images.
    """
    library, _, rest = weights.partition(":")
    name, _, file = rest.partition("=")
    if library in ("timm", "torchvision") and name:
        if dn is not None:
            raise InputError(f"--dn {dn} names a network of the run: leave it out with --weights {weights}")
        if file and not Path(file).is_file():
            raise InputError(f"--weights {weights}: there is no file {file}")
        try:
            return _timm(name, file) if library == "timm" else _torchvision(name, file)
        except InputError as error:
            raise InputError(f"--weights {weights}: {error}") from error
    if weights not in ("run", RANDOM):
        raise InputError(f"--weights {weights}: give run, {RANDOM}, timm:NAME[=FILE] or torchvision:NAME[=FILE]")
    if dn is None:
        raise InputError("--dn is missing: name a network of the run, such as --dn w0.50")
    network, source = pretrained_network(out, dn) if weights == "run" else random_network(out, dn, seed)
    format = PixelFormat.of(read_config(out, PretrainConfig))
    if format.channels != 3:
        raise InputError(f"{out} has networks for {format.channels} channels, and COCO's images are RGB")
    return Backbone(network, dn if weights == "run" else f"{dn}-{RANDOM}", source, format.mean, format.std)


def pretrained_network(out: Path, dn: str) -> tuple[Network, str]:
    """Load a network of a run: the exported one if it exists, otherwise cut out of the newest checkpoint.

    Args:
        out: run directory.
        dn: name of the network.

    Returns:
        The network in torch.nn layers, and a description of its origin.

    Raises:
        InputError: if neither exists, or if the run was trained further after the export.
    """
    folder = out / "exported" / dn
    if folder.is_dir():
        network = exported.load(folder)
        steps = json.loads((folder / exported.MANIFEST).read_text()).get("pretraining", {}).get("steps")
        newest = checkpoint.latest_step(out / "checkpoints")
        if newest and steps != newest:
            raise InputError(
                f"{folder} was exported at step {steps}, the run is at {newest}: export it again, or remove it"
            )
        assert isinstance(network, Network)
        return network, f"exported/{dn}, {steps} steps"
    trained = PretrainedFamily(out, torch.device("cpu"))
    network = slim(trained.cut(subnet(trained.config.network, dn)), None)
    assert isinstance(network, Network)
    return network, f"checkpoint, {trained.step} steps"


def random_network(out: Path, dn: str, seed: int) -> tuple[Network, str]:
    """A network of a run's family with the initial weights of a seed, in torch.nn layers, and a description."""
    config = read_config(out, PretrainConfig)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = slim(build(config.network, subnet(config.network, dn), config.stem, config.in_channels), None)
    assert isinstance(network, Network)
    return network, "random weights"


class FeatureMaps(nn.Module):
    """The maps of a network of another library.

    Args:
        network: images to a list of maps, by resolution.
        channels: of each of them.
    """

    def __init__(self, network: nn.Module, channels: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.map_channels = tuple(channels)

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The last map of strides 4, 8, 16 and 32."""
        return list(self.network(x))


def _timm(name: str, file: str) -> Backbone:
    config, classifiers = timm_config(name)
    import timm

    source = f"timm {name}"
    given: dict[str, Any] = {"pretrained": True, "features_only": True}
    if file:
        plain = timm.create_model(name, num_classes=0)
        state, by_order = match(plain, read_weights(Path(file)), classifiers, not file.endswith(SORTED))
        given["pretrained_cfg_overlay"] = {"state_dict": plain.state_dict() | state}
        source += f" from {file}" + (", matched by order" if by_order else "")
    try:
        network: Any = timm.create_model(name, **given)
        reductions = network.feature_info.reduction()
        indices = [max(i for i, found in enumerate(reductions) if found == stride) for stride in STRIDES]
        if len(reductions) > len(STRIDES):
            network = timm.create_model(name, out_indices=indices, **given)
    except Exception as error:  # downloads, missing weights, networks without maps: many types of exceptions
        raise InputError(
            f"timm cannot make feature maps of strides 4 to 32 with these weights: {first_line(error)}"
        ) from error
    channels = network.feature_info.channels()
    return Backbone(
        FeatureMaps(network, channels),
        published_name(f"timm:{name}", file),
        source,
        tuple(config.mean),
        tuple(config.std),
    )


def _torchvision(name: str, file: str) -> Backbone:
    from torchvision import models

    if name not in models.list_models(models):
        raise InputError(f"torchvision has no classifier {name!r}: torchvision.models.list_models() names them")
    try:
        network = models.get_model(name, weights=None if file else "DEFAULT")
    except Exception as error:  # of the download
        raise InputError(
            f"torchvision cannot load its weights ({error}): give a file, torchvision:{name}=FILE"
        ) from error
    source = f"torchvision {name}"
    if file:
        for classifier in CLASSIFIERS:
            if hasattr(network, classifier):
                setattr(network, classifier, nn.Identity())
        state, by_order = match(network, read_weights(Path(file)), CLASSIFIERS, not file.endswith(SORTED))
        load_state(network, state, strict=False)
        source += f" from {file}" + (", matched by order" if by_order else "")
    if hasattr(network, "layer4"):
        parts = [part for part_name, part in network.named_children() if part_name not in ("avgpool", *CLASSIFIERS)]
    elif isinstance(getattr(network, "features", None), nn.Sequential):
        parts = list(network.features)
    else:
        raise InputError("its feature maps are unknown: give a ResNet, or a network with `features`")
    maps = _LastOfStride(parts)
    return Backbone(FeatureMaps(maps, maps.channels), published_name(f"torchvision:{name}", file), source)


class _LastOfStride(nn.Module):
    """Parts of a network that run one after another; returns the last output of each of STRIDES."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)
        self._last: list[int] = []
        side = 64
        training = self.parts.training
        with torch.no_grad():
            outputs = list(self._outputs(torch.zeros(1, 3, side, side), self.parts.eval()))
        self.parts.train(training)
        for stride in STRIDES:
            of_stride = [i for i, found in enumerate(outputs) if found.ndim == 4 and found.shape[-1] == side // stride]
            if not of_stride:
                raise InputError(f"it has no feature map of stride {stride}")
            self._last.append(of_stride[-1])
        self.channels = [outputs[i].shape[1] for i in self._last]

    @staticmethod
    def _outputs(x: Tensor, parts: Any) -> Any:
        for part in parts:
            x = part(x)
            yield x

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps of images."""
        return [output for i, output in enumerate(self._outputs(x, self.parts)) if i in self._last]
