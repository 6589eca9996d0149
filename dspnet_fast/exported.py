"""Exported networks on disk: model.safetensors with the weights, and manifest.json, which describes the network.

Weights have timm's names, including a classifier's linear layer. A network converted to ONNX (`dspnet_fast.onnx_file`)
also has model.onnx.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import nn

from .atomic import write_bytes
from .errors import InputError
from .models import Classifier, Network, build, encoder_of
from .slim import slim
from .subnets import Subnet

FORMAT = 1
TORCHVISION: dict[tuple[int, ...], str] = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"}
WEIGHTS, MANIFEST, ONNX = "model.safetensors", "manifest.json", "model.onnx"


def save(
    directory: Path,
    network: Network | Classifier,
    subnet: Subnet,
    extra: dict[str, Any],
    converted: bytes | None = None,
    classes: Sequence[str] = (),
) -> None:
    """Write a network cut out by `slim` to a directory; existing files are replaced atomically.

    Args:
        directory: created if missing.
        network: a MobileNetV3 or ResNet of `subnet` in torch.nn layers, or a classifier with one as encoder.
        subnet: the network's subnet.
        extra: additional entries of the manifest (JSON values).
        converted: the network as ONNX. Without it an existing ONNX file, perhaps of other weights, is deleted.
        classes: names of a classifier's classes.

    Raises:
        ValueError: if the number of names is not the number of classes.
    """
    encoder = encoder_of(network)
    count = network.head.out_features if isinstance(network, Classifier) else 0
    if len(classes) != count:
        raise ValueError(f"classes has {len(classes)} names, but the network has {count} classes")
    directory.mkdir(parents=True, exist_ok=True)
    stem = "small" if encoder.small_stem else "standard"
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
        "loads_into": _loads_into(encoder.name, subnet, stem, count),
        "layers": layers(network),
    }
    state = network.state_dict()
    tensors = {_timm_name(network, name): tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    (directory / ONNX).unlink(missing_ok=True)
    metadata = {"format": "pt", "dn": subnet.name}
    write_bytes(directory / WEIGHTS, serialize(tensors, metadata))
    if converted is not None:
        write_bytes(directory / ONNX, converted)
    write_bytes(directory / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())


def load(directory: str | os.PathLike[str]) -> nn.Module:
    """Load an exported network as torch.nn layers, in evaluation mode.

    Args:
        directory: the network's folder, written by `save` or `dspnet-export`.

    Returns:
        A module from images [N, 3, H, W] to features [N, F], or for a classifier to logits [N, classes] in the order of
        the manifest's `class_names`. Images are RGB, float32 from 0 to 1, normalised by
        torchvision.transforms.functional.normalize(images, **manifest["normalization"]).

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
        network = plain(manifest["network"], subnet, manifest["stem"], len(manifest.get("class_names", ())))
        names = {_timm_name(network, name): name for name in network.state_dict()}
        tensors = load_file(folder / WEIGHTS)
        network.load_state_dict({names.get(name, name): tensor for name, tensor in tensors.items()})
    except FileNotFoundError as error:
        raise InputError(f"{folder} contains no exported network: {error.filename or error} is missing") from error
    except Exception as error:  # any error here means foreign or damaged files
        reason = str(error).splitlines()[-1].strip() if str(error) else type(error).__name__
        raise InputError(f"{folder} contains no valid exported network: {reason}") from error
    return network


def plain(network: str, subnet: Subnet, stem: str, classes: int = 0) -> nn.Module:
    """A new network of torch.nn layers.

    Args:
        network: a key of `models.NETWORKS`.
        subnet: its size.
        stem: "standard" or "small".
        classes: number of classes of a classifier; 0 for a network that returns features.
    """
    encoder = build(network, subnet, stem)
    return slim(Classifier(encoder, classes) if classes else encoder, None)


def _timm_name(network: nn.Module, name: str) -> str:
    """timm's name of a layer or tensor of a network."""
    if not isinstance(network, Classifier):
        return name
    part, dot, rest = name.partition(".")
    return rest if part == "encoder" else f"{network.encoder.head_name}{dot}{rest}"


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


def _loads_into(network: str, subnet: Subnet, stem: str, classes: int) -> dict[str, str]:
    """Constructors of timm's and torchvision's networks that take these weights, and the changes to them that are
    needed.

    See docs/export.md.
    """
    targets, changes = {}, []
    if network == "mobilenet_v3_large":
        width = subnet.name.removeprefix("w")
        timm = f"timm.models.mobilenetv3._gen_mobilenet_v3('mobilenetv3_large_100', {width}, num_classes=0)"
        targets["timm"] = timm
        if stem == "small":
            changes.append("conv_stem.stride = (1, 1)")
        if classes:  # timm has an additional layer before the classifier
            changes.append("conv_head = torch.nn.Identity(); act2 = torch.nn.Identity()")
            changes.append(f"classifier = torch.nn.Linear({subnet.channels[-1]}, {classes})")
    elif subnet.channels[0] == 64:  # timm and torchvision fix the stem's channels
        arguments = f"timm.models.resnet.BasicBlock, {list(subnet.depths)}, num_classes={classes}"
        targets["timm"] = f"timm.models.resnet.ResNet({arguments})"
        if subnet.depths in TORCHVISION:
            arguments = f"num_classes={classes}" if classes else ""
            targets["torchvision"] = f"torchvision.models.{TORCHVISION[subnet.depths]}({arguments})"
        if stem == "small":
            changes.append("conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False); maxpool = torch.nn.Identity()")
    if changes:
        targets["then"] = "; ".join(changes)
    return targets
