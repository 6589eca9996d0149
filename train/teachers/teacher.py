"""A frozen teacher: features of the same views that the subnets see, and the facts that runs and exports state."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dspnet_fast import atomic
from dspnet_fast.cost import mac_count, parameter_count
from dspnet_fast.errors import InputError

from ..config import PretrainConfig
from ..costs.flops import TeacherCost, map_shape
from ..data.datasets.pixels import PixelFormat
from ..pretraining.dspnet import HALF, Taught
from .sources import Source, dense, feature_count, load_source, map_channels, pooled

EIGHT_BIT_RGB = PixelFormat()
FACTS = "teacher.json"
MULTIPLE = 32  # of a default size, in pixels: the stride of most networks
VIEW_SIZES = 2  # largest default size, as a multiple of the views' size: larger ones add pixels but no detail


@dataclass(frozen=True)
class TeacherFacts:
    """The teacher as a run and the manifests of its exports describe it.

    Attributes:
        source: value of --teacher.
        architecture: name of the network.
        sha256: digest of its weights: names, dtypes, shapes and bytes of the state_dict's tensors.
        licence: licence of the weights; None if nothing states one.
        features: number of features.
        image_size: height and width of its images, in pixels.
        normalization: mean and std of its images.
        interpolation: how views are resized.
        map_channels: channels of the feature map that subnets learn to predict; None without --local-weight.
        macs: multiply-accumulates for one view.
        parameters: number of parameters.
    """

    source: str
    architecture: str
    sha256: str
    licence: str | None
    features: int
    image_size: int
    normalization: dict[str, list[float]]
    interpolation: str
    macs: int
    parameters: int
    map_channels: int | None = None

    def cost(self, config: PretrainConfig, images: int | None) -> TeacherCost:
        """Cost of the teacher in a run on this many images; with an unknown number, as if its views were computed."""
        cached = None if config.teacher_cache is None or images is None else cached_views(config) * images
        return TeacherCost(self.macs, self.features, cached, self.map_channels or 0)


class Teacher:
    """A frozen network in evaluation mode.

    Args:
        source: the network and its images.
        facts: facts about it.
        device: device to compute on.
        precision: precision of the run; "bf16" and "fp16" cast the network's weights.
        format: of the run's images.
        map_size: height and width of the subnets' feature maps; None if only pooled features are learnt.
    """

    def __init__(
        self,
        source: Source,
        facts: TeacherFacts,
        device: torch.device,
        precision: str = "fp32",
        format: PixelFormat = EIGHT_BIT_RGB,
        map_size: tuple[int, int] | None = None,
    ) -> None:
        self.facts = facts
        self.note = source.note
        network = source.network.requires_grad_(False).eval()
        self.network = network.to(device, HALF.get(precision)).to(memory_format=torch.channels_last)
        self._dtype = _dtype(self.network)
        self._map_size = map_size
        # With the run's MEAN and STD, (x STD + MEAN - mean) / std undoes its normalisation and applies the teacher's.
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float64, device=device).view(1, 3, 1, 1)
            for values in (source.mean, source.std, format.mean, format.std)
        )
        self._scale, self._shift = own_std / std, (own_mean - mean) / std
        self._normalized = (tuple(source.mean), tuple(source.std)) == (format.mean, format.std)

    def description(self) -> list[str]:
        """Lines to print at the start of a run."""
        facts = self.facts
        licence = facts.licence or "licence unknown"
        lines = [
            f"teacher  {facts.architecture}, {facts.features} features of views at {facts.image_size} px, {licence}, "
            f"weights {facts.sha256[:12]}"
        ]
        if facts.licence is None:
            lines.append(f"teacher  nothing states the licence of {facts.source}: see that you may use its weights")
        return [*lines, *([f"teacher  {self.note}"] if self.note else [])]

    def prepare(self, images: Tensor) -> Tensor:
        """Convert images to the teacher's normalisation and size.

        Args:
            images: floating point [N, 3, S, S], normalised as the run's.

        Returns:
            [N, 3, T, T] in the same dtype, channels-last, for `facts.image_size` T.
        """
        if not self._normalized:
            images = torch.addcmul(self._shift.to(images.dtype), images, self._scale.to(images.dtype))
        size = self.facts.image_size
        if images.shape[-1] != size:
            # With antialias the bicubic kernel is Pillow's, as in timm's transforms, and twice as fast on a CPU.
            images = F.interpolate(images, (size, size), mode=self.facts.interpolation, antialias=True)
        return images.contiguous(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        """Features [N, F] of images as `prepare` takes them, in float32, or float64 of a float64 network."""
        return self.outputs(images).features

    def outputs(self, images: Tensor) -> Taught:
        """Features of images as `prepare` takes them and, with --local-weight, the feature map at the subnets' size.

        Both in float32, or float64 of a float64 network.
        """
        dtype = torch.promote_types(self._dtype, torch.float32)
        with torch.inference_mode():
            images = self.prepare(images).to(self._dtype)
            if self._map_size is None:
                outputs = Taught(pooled(self.network(images)).to(dtype))
            else:
                features, y = dense(self.network, images)
                y = F.interpolate(y.to(dtype), self._map_size, mode="bilinear", antialias=True)
                outputs = Taught(features.to(dtype), y.flatten(2).transpose(1, 2))
        # Autograd cannot save tensors of the inference mode.
        return outputs.each(lambda tensor: tensor.clone(memory_format=torch.contiguous_format))


def cached_views(config: PretrainConfig) -> int:
    """Views of an image whose features --teacher-cache keeps: 2, the image and its mirror image, or 1 without flips."""
    return 2 if config.flip_probability else 1


def open_teacher(config: PretrainConfig, device: torch.device) -> Teacher | None:
    """Load the teacher of a run; None without --teacher.

    Raises:
        InputError: the network or its weights cannot be used, or its features are not finite or not [N, F].
    """
    if config.teacher is None:
        return None
    if config.in_channels != 3:
        raise InputError(
            f"--teacher takes RGB images, and this run has --channels {config.channels}: give --channels 3"
        )
    source = load_source(config.teacher, config.teacher_size)
    size = config.teacher_size or default_size(source, config.image_size)
    features, channels = _check(source.network, config, size)
    facts = _facts(config.teacher, source, _sha256(source.network), features, size, channels)
    map_size = map_shape(config)[1:] if config.local_weight else None
    return Teacher(source, facts, device, config.precision, PixelFormat.of(config), map_size)


def expected_facts(config: PretrainConfig) -> TeacherFacts | None:
    """Facts of the teacher of a run without its weights, for counts; None without --teacher."""
    if config.teacher is None:
        return None
    source = load_source(config.teacher, config.teacher_size, weights=False)
    size = config.teacher_size or default_size(source, config.image_size)
    features, channels = _check(source.network, config, size)
    return _facts(config.teacher, source, "", features, size, channels)


def with_teacher(config: PretrainConfig, facts: TeacherFacts | None) -> PretrainConfig:
    """The configuration with the teacher's size and numbers of features filled in."""
    if facts is None:
        return config
    return replace(
        config,
        teacher_size=facts.image_size,
        teacher_features=facts.features,
        teacher_map_channels=facts.map_channels,
    )


def without_teacher(config: PretrainConfig) -> PretrainConfig:
    """The configuration of the same run without a teacher."""
    return replace(
        config,
        teacher=None,
        teacher_size=None,
        teacher_features=None,
        teacher_map_channels=None,
        teacher_cache=None,
        self_weight=0.0,
        local_weight=0.0,
    )


def default_size(source: Source, image_size: int) -> int:
    """Size of the teacher's images: that of its training, and if it takes any, at most twice that of the views.

    Args:
        source: the teacher.
        image_size: height and width of the run's views, in pixels.
    """
    bound = MULTIPLE * math.ceil(VIEW_SIZES * image_size / MULTIPLE)
    return min(source.image_size, bound) if source.any_size else source.image_size


def _facts(name: str, source: Source, sha256: str, features: int, size: int, channels: int | None) -> TeacherFacts:
    normalization = {"mean": list(source.mean), "std": list(source.std)}
    return TeacherFacts(
        source=name,
        architecture=source.architecture,
        sha256=sha256,
        licence=source.licence,
        features=features,
        image_size=size,
        normalization=normalization,
        interpolation=source.interpolation,
        macs=mac_count(source.network, size),
        parameters=parameter_count(source.network),
        map_channels=channels,
    )


def _check(network: nn.Module, config: PretrainConfig, size: int) -> tuple[int, int | None]:
    """Numbers of features of the teacher and, with --local-weight, of its map; InputError if it cannot be used."""
    name = f"--teacher {config.teacher}"
    count = feature_count(network, size, name)
    if config.teacher_features not in (None, count):
        raise InputError(f"--teacher-features {config.teacher_features}, but {config.teacher} has {count} features")
    if not config.local_weight:
        return count, None
    channels = map_channels(network, size, name)
    if config.teacher_map_channels not in (None, channels):
        raise InputError(
            f"--teacher-map-channels {config.teacher_map_channels}, but the map of {config.teacher} has {channels}"
        )
    return count, channels


def _dtype(network: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in network.parameters()), torch.float32)


def _sha256(network: nn.Module) -> str:
    hashed = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def write_facts(out: Path, facts: TeacherFacts) -> None:
    """Write the facts of a run's teacher to OUT/teacher.json."""
    atomic.write_text(out / FACTS, json.dumps(asdict(facts), indent=2) + "\n")


def read_facts(out: Path) -> dict[str, Any] | None:
    """Read the facts of a run's teacher as JSON values; None for a run without one."""
    path = out / FACTS
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): copy it from another run with this teacher") from error


def exported_facts(out: Path) -> dict[str, Any] | None:
    """The facts for a manifest: as `read_facts`, but files and folders are named without the path to them."""
    facts = read_facts(out)
    if facts is None:
        return None
    network, _, file = facts["source"].rpartition("=")
    return facts | {"source": f"{network}={Path(file).name}" if network else Path(file).name}


def check_same(out: Path, facts: TeacherFacts | None) -> None:
    """Raise InputError if the run in `out` was begun with another teacher."""
    saved = read_facts(out)
    begun, given = None if saved is None else saved.get("sha256"), None if facts is None else facts.sha256
    if begun == given:
        return
    was, now = ("no teacher" if digest is None else f"a teacher of weights {digest[:12]}" for digest in (begun, given))
    raise InputError(f"the run in {out} was begun with {was} and cannot continue with {now}")
