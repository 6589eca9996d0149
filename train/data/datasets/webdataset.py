"""Images in WebDataset shards: tar files whose members belong together by name, `0001.jpg` and its label `0001.cls`.

An index beside each shard (`000.idx`, the format of DALI's wds2idx) says where its members lie, so that images are read
in any order; without one the shard is read through once. `sets.open_images` says what counts as a set of shards.
"""

from __future__ import annotations

import itertools
import os
import re
import tarfile
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from dspnet_fast.errors import InputError

from .folder import EXTENSIONS
from .images import ImageSet, Subset, decode

CLASSES = "classes.txt"  # beside the shards: the name of each class, a line each
TEST = "test"  # the folder beside the shards that holds the test split
LABEL = "cls"
INDEX = "v1.2"
END = 1024  # zero bytes at the end of a whole tar file

Member = tuple[str, int, int, str]  # extension, offset and size in bytes, name
Sample = dict[str, Member]  # by extension


class ShardImages:
    """Images in tar files, found by offset and size."""

    def __init__(self, name: str, shards: list[Path], samples: list[list[Sample]], classes: list[str]):
        self.name = name
        self.classes: list[str] = []
        self.labels: torch.Tensor | None = None
        self._shards = shards
        self._shard = np.repeat(np.arange(len(shards)), [len(of_shard) for of_shard in samples])
        members = [_image(sample) for of_shard in samples for sample in of_shard]
        self._places = np.array([member[1:3] for member in members], dtype=np.int64).reshape(-1, 2)
        self._members = [member[3] for member in members]
        labels = self._read_labels([sample.get(LABEL) for of_shard in samples for sample in of_shard])
        if labels is not None:
            self.labels = torch.tensor(labels, dtype=torch.int64)
            self.classes = classes or [str(label) for label in range(max(labels) + 1)]
            if max(labels) >= len(self.classes):
                raise InputError(f"{name} has a label {max(labels)}, but {CLASSES} names {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self._members)

    def load(self, i: int) -> Image.Image:
        return decode(self.encoded(i), self.file(i))

    def encoded(self, i: int) -> bytes:
        try:
            content = self._read(int(self._shard[i]), *self._places[i].tolist())
        except OSError as error:
            raise InputError(f"cannot read the image {self.file(i)}: {error.strerror}") from error
        if len(content) < self._places[i, 1]:
            raise InputError(f"cannot read the image {self.file(i)}: the shard has become shorter")
        return content

    def file(self, i: int) -> str:
        return f"{self._shards[self._shard[i]]}/{self._members[i]}"

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        with open(self._shards[shard], "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    def _read_labels(self, members: list[Member | None]) -> list[int] | None:
        if not any(members):
            return None
        labels = []
        for i, member in enumerate(members):
            text = b"" if member is None else self._read(int(self._shard[i]), *member[1:3])
            if not text.strip().isdigit():
                raise InputError(f"{self.file(i)} has no label, a whole number in a .{LABEL} file, but others have one")
            labels.append(int(text))
        return labels


def open_shards(pattern: str, split: Literal["train", "test"]) -> ImageSet:
    """One split of the shards that `pattern` names, as `expand` reads it; InputError if one is missing or damaged."""
    shards = expand(pattern)
    beside = shards[0].parent / TEST
    if split == "test" and beside.is_dir():
        return _open(f"{beside}/*.tar", expand(f"{beside}/*.tar"))
    images = _open(pattern, shards)
    if beside.is_dir():
        return images
    if images.labels is None:
        return images if split == "train" else Subset(images, range(0, len(images), 10))
    held_out = np.zeros(len(images), dtype=bool)
    for label in range(len(images.classes)):
        held_out[np.flatnonzero(images.labels.numpy() == label)[::10]] = True
    return Subset(images, np.flatnonzero(held_out if split == "test" else ~held_out).tolist())


def is_folder_of_shards(path: Path) -> bool:
    """Whether a folder holds tar files, and no images or classes that would make it an image folder."""
    entries = [entry for entry in os.scandir(path) if not entry.name.startswith(".")]
    folders = {entry.name for entry in entries if entry.is_dir()}
    endings = {Path(entry.name).suffix.lower() for entry in entries if entry.is_file()}
    return ".tar" in endings and folders <= {TEST} and not endings & set(EXTENSIONS)


def expand(pattern: str) -> list[Path]:
    """The paths that `{000..015}`, `{a,b}` and `*` in a pattern stand for, in order; InputError if one is not there."""
    found: list[Path] = []
    for name in _braces(str(Path(pattern).expanduser())):
        paths = sorted(map(Path, glob(name))) if "*" in name else [Path(name)]
        if not paths or not paths[0].is_file():
            raise InputError(f"there is no shard {name}: name those that there are, as in 'shards/{{000..015}}.tar'")
        found += paths
    return found


def _braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        first, last = numbers.groups()
        choices = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    else:
        choices = match[1].split(",")
    head, tail = pattern[: match.start()], _braces(pattern[match.end() :])
    return [head + choice + rest for choice in choices for rest in tail]


def _open(name: str, shards: list[Path]) -> ShardImages:
    samples = [[sample for sample in read_index(shard) if set(sample) & _SUFFIXES] for shard in shards]
    if not any(samples):
        raise InputError(f"{name} holds no images (members that count: {' '.join(EXTENSIONS)})")
    names = shards[0].with_name(CLASSES)
    return ShardImages(name, shards, samples, names.read_text().splitlines() if names.is_file() else [])


_SUFFIXES = {extension.removeprefix(".") for extension in EXTENSIONS}


def _image(sample: Sample) -> Member:
    return next(member for extension, member in sample.items() if extension in _SUFFIXES)


def read_index(shard: Path) -> list[Sample]:
    """The samples of a shard, from its index if it has one; InputError if the shard is damaged or not whole."""
    index = shard.with_suffix(".idx")
    try:
        size = shard.stat().st_size
        with open(shard, "rb") as file:
            file.seek(max(0, size - END))
            if size < END or size % 512 or any(file.read()):
                raise InputError(f"the shard {shard} has no end: it was not written or copied as a whole, get it anew")
        if index.is_file() and index.stat().st_mtime >= shard.stat().st_mtime:
            return _parse_index(index, size)
        return list(scan(shard))
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"cannot read the shard {shard} ({error}): get it anew") from error


def _parse_index(index: Path, size: int) -> list[Sample]:
    header, *lines = index.read_text().splitlines() or [""]
    try:
        version, count = header.split()
        samples = []
        for line in lines:
            words = line.split()
            members = [(e, int(o), int(s), n) for e, o, s, n in zip(*[iter(words)] * 4, strict=True)]
            if not members or any(offset + length > size - END for _, offset, length, _ in members):
                raise ValueError("it points behind the end of the shard")
            samples.append({member[0]: member for member in members})
        if version != INDEX or len(samples) != int(count):
            raise ValueError(f"not the {count} samples that it announces")
    except ValueError as error:
        raise InputError(f"{index} is not the index of its shard ({error}): delete it to have it made anew") from error
    return samples


def scan(shard: Path) -> Iterator[Sample]:
    """The samples of a tar file, by reading all its headers."""
    with tarfile.open(shard, "r:") as tar:
        files = [(*_split(member.name), member) for member in tar if member.isfile()]
    for _, group in itertools.groupby(files, key=lambda file: file[0]):
        yield {extension: (extension, m.offset_data, m.size, m.name) for _, extension, m in group}


def _split(name: str) -> tuple[str, str]:
    """WebDataset's rule: the extension is all that follows the first dot of the file's own name."""
    folder, base = os.path.split(name)
    stem, _, extension = base.partition(".")
    return os.path.join(folder, stem), extension.lower()


def write_index(shard: Path, index: Path) -> int:
    """Write the index of a shard; returns how many samples it has."""
    samples = list(scan(shard))
    lines = [" ".join(f"{e} {o} {s} {n}" for e, o, s, n in sample.values()) for sample in samples]
    index.write_text("\n".join([f"{INDEX} {len(samples)}", *lines]) + "\n")
    return len(samples)
