"""Short names for exactly these numbers, images or options: what results on disk are kept under."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ..data.images import ImageSet


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


def of_images(images: ImageSet) -> str:
    """Of a set's files, in their order, and labels; not of what the files hold, which only reading them all tells."""
    labels = [] if images.labels is None else [images.labels]
    return digest(*(images.file(i) for i in range(len(images))), *labels)
