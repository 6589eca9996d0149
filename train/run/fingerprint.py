"""Digests of tensors and options, used as keys of results on disk."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def digest(*parts: object) -> str:
    """Return a digest of tensors and plain values.

    Args:
        parts: tensors, hashed by dtype, shape and bytes; other values by their repr.

    Returns:
        16 hex digits.
    """
    hashed = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, Tensor):
            hashed.update(f"{part.dtype}{tuple(part.shape)}".encode())
            hashed.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            hashed.update(f"{part!r}\n".encode())
    return hashed.hexdigest()
