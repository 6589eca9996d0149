"""Weights of files: read without executing code, and loaded into networks."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import InputError, first_line

WRAPPERS = ("state_dict", "model_state_dict", "model", "teacher")  # keys under which training programs save the weights
PREFIXES = ("module.", "_orig_mod.")  # of networks in DistributedDataParallel and torch.compile
SORTED = ".safetensors"  # files that hold the tensors in the order of their names


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state_dict in the order of the file.

    Args:
        path: a .safetensors file, or a .pth or .bin file of `torch.save` that holds tensors and plain values only.

    Raises:
        InputError: the file is missing or damaged, holds no weights, or would execute code when it is unpickled.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}: give the path of the weights, .safetensors or .pth")
    content: Any
    try:
        if path.suffix == SORTED:
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors, or is damaged: reading it could execute code, so it is refused; save its "
            "state_dict as a .safetensors file"
        ) from error
    except Exception as error:  # files of other kinds raise errors of many types
        raise InputError(
            f"{path} is no readable file of weights ({type(error).__name__}): {first_line(error)}"
        ) from error
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {}
    for name, value in content.items() if isinstance(content, Mapping) else ():
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        if isinstance(value, Tensor):
            tensors[name] = value
    if not tensors:
        raise InputError(f"{path} holds no weights: a state_dict, tensors by name, is needed")
    return tensors


def load_state(module: nn.Module, tensors: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:
    """Load a state_dict of a file, by `torch.nn.Module.load_state_dict`.

    A state_dict also holds the version of every layer, which files of tensors do not have. Without it some layers
    refuse the tensors (torchvision's MNASNet), or convert them as those of an older version. The versions are taken to
    be those of the module.

    Args:
        module: the network.
        tensors: tensors by name.
        strict, assign: as of `load_state_dict`.

    Raises:
        RuntimeError: if names or shapes do not fit.

    Example:
        >>> layer = nn.BatchNorm2d(8)
        >>> load_state(layer, {name: tensor.clone() for name, tensor in layer.state_dict().items()})
    """
    state = OrderedDict(tensors)
    state._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(state, strict, assign)
