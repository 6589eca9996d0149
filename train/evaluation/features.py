"""Representations of images by every subnet of an encoder, and the files that store them."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dspnet_fast import atomic
from dspnet_fast.errors import InputError
from dspnet_fast.nn import activate
from dspnet_fast.subnets import Subnet

from ..distributed.process_group import SINGLE_PROCESS, World

FLOAT = 4  # bytes


@torch.no_grad()
def representations(
    encoder: nn.Module, subnets: Iterable[Subnet], batches: Iterable[Tensor], maps: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Compute features of batches of images by all subnets.

    Args:
        encoder: slimmable network with post-statistics of `subnets`; stays in evaluation mode.
        subnets: subnets of the encoder.
        batches: images [B, 3, H, W] on the encoder's device.
        maps: compute the feature maps before the pooling.

    Yields:
        Features [B, F] in float32 by subnet, on the same device; of maps [B, F * h * w].
    """
    encoder.eval()
    subnets = list(subnets)
    for images in batches:
        features = {}
        for subnet in subnets:
            with activate(encoder, subnet):
                output = last_map(encoder, images).flatten(1) if maps else encoder(images)
                features[subnet.name] = output.float()
        yield features


def last_map(encoder: Any, images: Tensor) -> Tensor:
    """The feature map [B, F, h, w] before the pooling, of the active subnet; InputError if there is none."""
    return encoder.forward_dense(images)[1]


def extract(encoder: nn.Module, subnets: Iterable[Subnet], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Features [N, F] of all images by subnet, in float32 on the CPU; arguments as of `representations`."""
    parts: dict[str, list[Tensor]] = {}
    for features in representations(encoder, subnets, batches):
        for name, rows in features.items():
            parts.setdefault(name, []).append(rows.cpu())
    return {name: torch.cat(rows) for name, rows in parts.items()}


def load_or_compute(
    files: Mapping[str, Path],
    shapes: Mapping[str, tuple[int, int]],
    batch: int,
    compute: Callable[[list[str], int], Iterable[Mapping[str, Tensor]]],
    world: World = SINGLE_PROCESS,
) -> dict[str, Tensor]:
    """Load features from files; compute and save those whose file is missing.

    Each file is a memory-mapped .npy file of float32. It is written under the suffix `.partial`, which survives an
    interruption: the next call continues after its last whole batch.

    Args:
        files: file of each network, whose name must identify weights and images.
        shapes: (images, features) of each network.
        batch: rows per batch of `compute`; the last batch may be smaller.
        compute: given names of networks and a row, yields their features from this row on in batches [<= batch, F]; on
            several ranks it yields all of them on rank 0 and nothing on the others, which take part.
        world: the ranks; all must see the files. Rank 0 writes them.

    Returns:
        Features [N, F] by network.

    Raises:
        InputError: if the disk is too small or a file is damaged.
    """
    missing = world.all_gather([name for name, path in files.items() if not path.exists()])[0]
    if missing:
        for path in files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        _compute_missing({name: files[name] for name in missing}, shapes, batch, compute, world)
        world.barrier()
    return {name: _load(path, shapes[name]) for name, path in files.items()}


def _load(path: Path, shape: tuple[int, int]) -> Tensor:
    try:
        # Copy on write: torch requires writable memory, and the file must not change.
        features = np.load(path, mmap_mode="c")
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it to compute it again") from error
    if features.shape != shape or features.dtype != np.float32:
        raise InputError(f"{path} is not a float32 array of shape {list(shape)}: delete it to compute it again")
    return torch.from_numpy(features)


def _compute_missing(
    files: Mapping[str, Path],
    shapes: Mapping[str, tuple[int, int]],
    batch: int,
    compute: Callable[[list[str], int], Iterable[Mapping[str, Tensor]]],
    world: World,
) -> None:
    partial = {name: path.with_suffix(".partial") for name, path in files.items()}
    headers = {name: _header(shapes[name]) for name in files}
    done = min(_whole_rows(partial[name], len(headers[name]), shapes[name]) for name in files) // batch * batch
    done = world.all_gather(done)[0]
    if not world.is_main:
        for _ in compute(list(files), done):
            pass
        return
    folder = next(iter(files.values())).parent
    needed = sum(rows * columns * FLOAT for rows, columns in (shapes[name] for name in files))
    free = shutil.disk_usage(folder).free
    partial_bytes = sum(path.stat().st_size for path in partial.values() if path.exists())
    if needed > free + partial_bytes:
        raise InputError(
            f"the features need {needed / 1e9:,.1f} GB, but {folder} has {free / 1e9:,.1f} GB free: make room, or "
            "replace the folder by a link to a larger disk"
        )
    with atomic.needs_room(folder), ExitStack() as stack:
        open_files = {}
        for name, path in partial.items():
            # Unbuffered: written data reaches the file even if the process is killed.
            file = stack.enter_context(open(path, "r+b" if path.exists() else "w+b", buffering=0))
            file.truncate(len(headers[name]) + done * shapes[name][1] * FLOAT if done else 0)
            file.seek(0, os.SEEK_END)
            if not done:
                file.write(headers[name])
            open_files[name] = file
        for features in compute(list(files), done):
            for name, file in open_files.items():
                rows = features[name].cpu().contiguous().numpy()
                if file.write(rows.data) != rows.nbytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial[name]))
    for name, path in partial.items():
        atomic.sync(path)
        os.replace(path, files[name])
    atomic.sync(folder)


def _header(shape: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _whole_rows(path: Path, header: int, shape: tuple[int, int]) -> int:
    return max(0, path.stat().st_size - header) // (shape[1] * FLOAT) if path.exists() else 0
