"""Fashion-MNIST (Xiao, Rasul & Vollgraf 2017): 60,000 + 10,000 greyscale images of 28 x 28 pixels, 10 classes."""

import gzip
import logging
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torchvision.datasets import FashionMNIST

from dspnet_fast.errors import InputError

from .images import ArrayDataset

NAME = "fashion-mnist"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
PREFIXES = {"train": "train", "test": "t10k"}


def open_dataset(split: Literal["train", "test"], data: Path, download: bool) -> ArrayDataset:
    """Open one split.

    Args:
        split: which split.
        data: folder searched first; Debian's package is searched next.
        download: whether to download missing files into `data`.

    Raises:
        InputError: the images are missing or damaged, or the download fails.
    """
    torchvision_folder = data / "FashionMNIST" / "raw"
    files = None
    for folder in (data / NAME, torchvision_folder, DEBIAN):
        files = files or _files(folder, split)
    if files is None and download:
        logging.getLogger(__name__).info("downloading %s into %s", NAME, data)
        try:
            FashionMNIST(str(data), download=True)
        except (OSError, RuntimeError) as error:
            raise _not_found(data, " ".join(str(error).split())) from error
        files = _files(torchvision_folder, split)
    if files is None:
        raise _not_found(data, "not found, and downloading is off")
    images, labels = (_read(path, dimensions) for path, dimensions in zip(files, (3, 1), strict=True))
    if len(images) != len(labels) or len(images) == 0 or labels.max() >= len(FashionMNIST.classes):
        raise InputError(f"{files[0]} and {files[1]} do not match: delete both to download them again")
    return ArrayDataset(
        NAME, f"{NAME}'s {split} split", images, torch.from_numpy(labels.astype(np.int64)), list(FashionMNIST.classes)
    )


def _not_found(data: Path, reason: str) -> InputError:
    return InputError(
        f"no {NAME} ({reason}): put its four .gz files into {data / NAME}, or install Debian's package "
        "dataset-fashion-mnist, or allow the download on a machine with a network"
    )


def _files(folder: Path, split: str) -> tuple[Path, Path] | None:
    """The image and the label file of the split, compressed or not, if the folder has both."""
    found = [
        next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)
        for stem in (f"{PREFIXES[split]}-images-idx3-ubyte", f"{PREFIXES[split]}-labels-idx1-ubyte")
    ]
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def _read(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file: bytes 0, 0, 8 (uint8) and the number of dimensions, big-endian int32 sizes, then the values."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
        if content[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError("not an IDX file of bytes")
        shape = np.frombuffer(content, ">i4", dimensions, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path} is damaged ({error}): delete it to download it again") from error
