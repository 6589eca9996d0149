"""Weight files of other programs, read without executing code."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

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
