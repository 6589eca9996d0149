"""Short names for exactly these numbers or options: what results on disk are kept under."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def digest(*parts: object) -> str:
    """16 hex digits of tensors (their bytes, dtypes and shapes) and of plain values (their repr)."""
    hashed = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, Tensor):
            hashed.update(f"{part.dtype}{tuple(part.shape)}".encode())
            hashed.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            hashed.update(f"{part!r}\n".encode())
    return hashed.hexdigest()
