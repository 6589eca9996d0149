"""Safetensors files of which equal contents are equal bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from .atomic import write_bytes

ALIGNMENT = 8  # bytes, of the header and of the tensors behind it


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata to a safetensors file atomically, with the metadata in the order of its keys.

    The library writes the metadata in a random order, so that a digest of the file would change from run to run.

    Raises:
        InputError: if the disk is full.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "weights.safetensors"
        >>> write_tensors(path, {"weight": torch.ones(2)}, {"b": "2", "a": "1"})
        >>> path.stat().st_size
        112
    """
    content = save(dict(tensors), dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    write_bytes(path, len(text).to_bytes(8, "little") + text + content[end:])
