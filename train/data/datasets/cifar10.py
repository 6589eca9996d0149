"""CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 RGB images of 32 x 32 pixels, 10 classes.

The "python version" is a folder of pickles. Loading a pickle can execute code, so this module uses an unpickler that
only creates numpy arrays.
"""

import io
import logging
import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_and_extract_archive

from dspnet_fast.errors import InputError

from .folder import FolderDataset, open_folder
from .images import ArrayDataset

NAME = "cifar10"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
_RECONSTRUCT = np.empty(0).__reduce__()[0]
ARRAY_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,  # its name in the published files
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,  # its name since numpy 2
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
MD5 = {"train": dict(CIFAR10.train_list), "test": dict(CIFAR10.test_list)}


def open_dataset(split: Literal["train", "test"], data: Path, download: bool) -> ArrayDataset | FolderDataset:
    """Open one split.

    Args:
        split: which split.
        data: folder with the published batches or an image folder `cifar10`.
        download: whether to download missing batches into `data`.

    Raises:
        InputError: the images are missing or damaged, or the download fails.
    """
    batches = data / CIFAR10.base_folder
    for folder in (batches, data / NAME / CIFAR10.base_folder):
        if folder.is_dir():
            return _open_batches(folder, split)
    if (data / NAME).is_dir():
        return open_folder(data / NAME, split)
    if not download:
        raise _not_found(data, "not found, and downloading is off")
    logging.getLogger(__name__).info("downloading %s into %s", NAME, data)
    try:
        download_and_extract_archive(CIFAR10.url, str(data), filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
    except (OSError, RuntimeError) as error:
        raise _not_found(data, " ".join(str(error).split())) from error
    return _open_batches(batches, split)


def _not_found(data: Path, reason: str) -> InputError:
    return InputError(
        f"no {NAME} ({reason}): put the folder {CIFAR10.base_folder}, or an image folder {NAME}, into {data}, "
        "or allow the download on a machine with a network"
    )


def _open_batches(folder: Path, split: str) -> ArrayDataset:
    for name, md5 in MD5[split].items():
        if not check_integrity(str(folder / name), md5):
            raise InputError(
                f"{folder / name} is missing or not the published file: delete {folder} to download it again"
            )
    batches = [read_batch(folder / name) for name in MD5[split]]
    pixels = np.concatenate([pixels for pixels, _ in batches])
    labels = torch.tensor([label for _, labels in batches for label in labels], dtype=torch.int64)
    return ArrayDataset(NAME, f"{NAME}'s {split} split", pixels, labels, list(CLASSES))


def read_batch(path: Path) -> tuple[np.ndarray, list[int]]:
    """Read one batch file without executing code.

    Returns:
        Pixels, uint8 [N, 32, 32, 3], and N labels.

    Raises:
        InputError: the file is damaged or contains anything but arrays.
    """
    try:
        # latin1: the files are from Python 2, which stores the arrays' bytes as strings
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        pixels, labels = batch["data"], batch["labels"]
        if pixels.dtype != np.uint8 or len(pixels) != len(labels) or not set(labels) <= set(range(len(CLASSES))):
            raise ValueError("not uint8 pixels with one label from 0 to 9 each")
        return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels
    except Exception as error:  # the exceptions for a damaged pickle are not specified
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} is not a batch of {NAME} ({reason}): delete {path.parent} to download it again"
        ) from error


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAY_GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return ARRAY_GLOBALS[module, name]
