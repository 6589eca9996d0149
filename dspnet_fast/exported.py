"""Exported networks on disk: model.safetensors with the weights, and manifest.json, which describes the network.

Weights have timm's names, including a classifier's linear layer. A network converted to ONNX (`dspnet_fast.onnx_file`)
also has model.onnx.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from .atomic import write_bytes
from .device_formats import FILES
from .errors import InputError
from .models import Classifier, Network, build, encoder_of
from .models.traced import TracedNetwork
from .slim import slim
from .subnets import Subnet
from .tensor_file import write_tensors
from .weight_file import load_state

FORMAT = 1
TORCHVISION: dict[tuple[int, ...], str] = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"}
WEIGHTS, MANIFEST, ONNX, PROGRAM = "model.safetensors", "manifest.json", "model.onnx", "model.pt2"
TIMM_DEPTHS = ("layers", "depths", "depth")  # arguments of constructors


def save(
    directory: Path,
    network: Network | Classifier,
    subnet: Subnet,
    extra: dict[str, Any],
    converted: Mapping[str, bytes] | None = None,
    classes: Sequence[str] = (),
) -> None:
    """Write a network cut out by `slim` to a directory; existing files are replaced atomically.

    Args:
        directory: created if missing.
        network: a MobileNetV3 or ResNet of `subnet` in torch.nn layers, or a classifier with one as encoder.
        subnet: the network's subnet.
        extra: additional entries of the manifest (JSON values).
        converted: the network in other formats, content by file name. Files of other formats that are not given are
            deleted, because they are perhaps of other weights.
        classes: names of a classifier's classes.

    Raises:
        ValueError: if the number of names is not the number of classes.
    """
    encoder = encoder_of(network)
    count = network.head.out_features if isinstance(network, Classifier) else 0
    if len(classes) != count:
        raise ValueError(f"classes has {len(classes)} names, but the network has {count} classes")
    directory.mkdir(parents=True, exist_ok=True)
    stem = _stem(encoder)
    manifest = {
        "format": FORMAT,
        "network": encoder.name,
        "dn": subnet.name,
        "channels": list(subnet.channels),
        "depths": list(subnet.depths),
        "stem": stem,
        "features": subnet.channels[-1],
        **({"num_classes": count, "class_names": list(classes)} if count else {}),
        **extra,
        "loads_into": loads_into(network, subnet),
        "layers": layers(network),
    }
    state = network.state_dict()
    tensors = {_timm_name(network, name): tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    for name in (ONNX, PROGRAM, *itertools.chain(*FILES.values())):
        (directory / name).unlink(missing_ok=True)
    metadata = {"format": "pt", "dn": subnet.name}
    write_tensors(directory / WEIGHTS, tensors, metadata)
    for name, content in (converted or {}).items():
        write_bytes(directory / name, content)
    write_bytes(directory / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())


def load(directory: str | os.PathLike[str]) -> nn.Module:
    """Load an exported network as torch.nn layers, in evaluation mode.

    Args:
        directory: the network's folder, written by `save` or `dspnet-export`.

    Returns:
        A module from images [N, C, H, W] to features [N, F], or for a classifier to logits [N, classes] in the order of
        the manifest's `class_names`. Images have the manifest's `pixels["channels"]` (RGB if 3), float32, rescaled from
        its `pixels["range"]` to 0 to 1, normalised by torchvision.transforms.functional.normalize(images,
        **manifest["normalization"]).

    Raises:
        InputError: if the folder contains no exported network, or the weights do not fit the manifest.

    Example:
        >>> network = plain("resnet", Subnet("c8-d1111", (8, 8, 16, 32, 64), (1, 1, 1, 1)), "small")
        >>> save(folder, network, network.full, {})
        >>> load(folder)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 64])
    """
    folder = Path(directory)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        subnet = Subnet(manifest["dn"], tuple(manifest["channels"]), tuple(manifest["depths"]))
        classes, channels = len(manifest.get("class_names", ())), manifest.get("pixels", {}).get("channels", 3)
        network = plain(manifest["network"], subnet, manifest["stem"], classes, channels)
        names = {_timm_name(network, name): name for name in network.state_dict()}
        tensors = load_file(folder / WEIGHTS)
        load_state(network, {names.get(name, name): tensor for name, tensor in tensors.items()})
    except FileNotFoundError as error:
        raise InputError(f"{folder} contains no exported network: {error.filename or error} is missing") from error
    except Exception as error:  # any error here means foreign or damaged files
        reason = str(error).splitlines()[-1].strip() if str(error) else type(error).__name__
        raise InputError(f"{folder} contains no valid exported network: {reason}") from error
    return network


def plain(network: str, subnet: Subnet, stem: str, classes: int = 0, in_channels: int = 3) -> nn.Module:
    """A new network of torch.nn layers.

    Args:
        network: a key of `models.NETWORKS`.
        subnet: its size.
        stem: "standard" or "small".
        classes: number of classes of a classifier; 0 for a network that returns features.
        in_channels: channels of the images.
    """
    encoder = build(network, subnet, stem, in_channels)
    return slim(Classifier(encoder, classes) if classes else encoder, None)


def _timm_name(network: nn.Module, name: str) -> str:
    """timm's name of a layer or tensor of a network."""
    if not isinstance(network, Network | Classifier):
        return name
    encoder = encoder_of(network)
    if isinstance(network, Classifier):
        part, dot, rest = name.partition(".")
        if part != "encoder":
            return f"{encoder.head_name}{dot}{rest}"
        name = rest
    return name.removeprefix(encoder.prefix)


def layers(network: nn.Module) -> list[dict[str, Any]]:
    """The layers without children, in order of definition: name, torch.nn type and constructor arguments."""
    described = []
    for name, module in network.named_modules():
        if any(module.children()) or isinstance(module, nn.Identity):
            continue
        parameters = inspect.signature(type(module)).parameters
        values = {key: getattr(module, key, None) for key in parameters}
        arguments = {key: value for key, value in values.items() if isinstance(value, int | float | str | bool | tuple)}
        if isinstance(module, nn.Conv2d | nn.Linear):
            arguments["bias"] = module.bias is not None
        described.append({"name": _timm_name(network, name), "type": type(module).__name__, **arguments})
    return described


def _stem(network: Network) -> str:
    return "small" if network.small_stem else "standard"


def loads_into(model: Network | Classifier, subnet: Subnet) -> dict[str, str]:
    """Constructors of timm's and torchvision's networks that take an exported network's weights (docs/export.md).

    Args:
        model: a network cut out by `slim`.
        subnet: the network's subnet.

    Returns:
        Expressions by library, and under "then" the changes to the network that are needed; empty if no library has a
        network of this size.

    Example:
        >>> from dspnet_fast.models import subnet
        >>> dn = subnet("resnet", "c64-d1111")
        >>> loads_into(slim(build("resnet", dn), None), dn)["timm"]
        'timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=0)'
    """
    network, stem = encoder_of(model), _stem(encoder_of(model))
    classes = model.head.out_features if isinstance(model, Classifier) else 0
    targets, changes = {}, []
    channels = network.in_channels
    in_chans = "" if channels == 3 else f", in_chans={channels}"
    if network.name == "mobilenet_v3_large":
        width = subnet.name.removeprefix("w")
        timm = f"timm.models.mobilenetv3._gen_mobilenet_v3('mobilenetv3_large_100', {width}, num_classes=0{in_chans})"
        targets["timm"] = timm
        if stem == "small":
            changes.append("conv_stem.stride = (1, 1)")
        if classes:  # timm has an additional layer before the classifier
            changes.append("conv_head = torch.nn.Identity(); act2 = torch.nn.Identity()")
            changes.append(f"classifier = torch.nn.Linear({subnet.channels[-1]}, {classes})")
    elif ":" in network.name:
        library, _, name = network.name.partition(":")
        whole = re.match(r"w1(\.0+)?(-|$)", subnet.name)
        if library == "timm" and not classes and whole and isinstance(network, TracedNetwork):
            depths = _timm_depths(network, name, subnet)
            if depths is not None:
                targets["timm"] = f"timm.create_model({name!r}, num_classes=0{in_chans}{depths})"
    elif subnet.channels[0] == 64:  # timm and torchvision fix the stem's channels
        arguments = f"timm.models.resnet.BasicBlock, {list(subnet.depths)}, num_classes={classes}{in_chans}"
        targets["timm"] = f"timm.models.resnet.ResNet({arguments})"
        if subnet.depths in TORCHVISION:
            arguments = f"num_classes={classes}" if classes else ""
            targets["torchvision"] = f"torchvision.models.{TORCHVISION[subnet.depths]}({arguments})"
        if stem == "small":
            changes.append(f"conv1 = torch.nn.Conv2d({channels}, 64, 3, padding=1, bias=False)")
            changes.append("maxpool = torch.nn.Identity()")
        elif channels != 3:
            changes.append(f"conv1 = torch.nn.Conv2d({channels}, 64, 7, 2, 3, bias=False)")
    if changes:
        targets["then"] = "; ".join(changes)
    return targets


def _timm_depths(network: TracedNetwork, name: str, subnet: Subnet) -> str | None:
    """Arguments of `timm.create_model` that give a network of these shapes; None if there are none."""
    import timm

    shapes = {key: tensor.shape for key, tensor in network.body.state_dict().items()}
    value = list(subnet.depths) if len(subnet.depths) > 1 else subnet.depths[0]
    options: list[dict[str, Any]] = [{}, *({argument: value} for argument in TIMM_DEPTHS)]
    for arguments in options:
        try:
            with torch.random.fork_rng(devices=[]):
                made = timm.create_model(name, num_classes=0, in_chans=network.in_channels, **arguments)
        except Exception:  # the constructor has no such argument, or not this value
            continue
        if {key: tensor.shape for key, tensor in made.state_dict().items()} == shapes:
            return "".join(f", {argument}={depths}" for argument, depths in arguments.items())
    return None
