"""Images in WebDataset shards: tar files whose members belong together by name, such as `0001.jpg` and `0001.cls`.

An index beside each shard (`000.idx`, the format of DALI's wds2idx) gives the offsets of the members for random access;
without it the headers of the shard are read once. `open_images` describes the layout of shards.
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

from .folder_files import EXTENSIONS
from .images import ImageDataset, Subset, decode, held_out

CLASSES = "classes.txt"  # beside the shards: one class name per line
TEST = "test"  # folder of the test split, beside the shards
LABEL = "cls"
INDEX = "v1.2"
GZIP = b"\x1f\x8b"
END = 1024  # zero bytes at the end of a complete tar file

Member = tuple[str, int, int, str]  # extension, offset and size in bytes, name
Sample = dict[str, Member]  # by extension


class ShardDataset:
    """A dataset of images in tar files, read by offset and size.

    Args:
        name: of the dataset.
        shards: paths of the tar files.
        samples: the samples of each shard; each has an image.
        classes: names of the classes; empty for the labels themselves.

    Raises:
        InputError: a label exceeds the number of classes.
    """

    def __init__(self, name: str, shards: list[Path], samples: list[list[Sample]], classes: list[str]):
        self.name = name
        self.classes: list[str] = []
        self.labels: torch.Tensor | None = None
        self._shards = shards
        images = [[(_images(sample), sample.get(LABEL)) for sample in of_shard] for of_shard in samples]
        pairs = [[(member, label) for members, label in of_shard for member in members] for of_shard in images]
        self._shard = np.repeat(np.arange(len(shards)), [len(of_shard) for of_shard in pairs])
        members = [member for of_shard in pairs for member, _ in of_shard]
        self._places = np.array([member[1:3] for member in members], dtype=np.int64).reshape(-1, 2)
        self._members = [member[3] for member in members]
        self.note = _note(samples)
        texts = self._read_labels([label for of_shard in pairs for _, label in of_shard])
        if texts and all(text.isdigit() for text in texts):
            labels = list(map(int, texts))
            self.classes = classes or [str(label) for label in range(max(labels) + 1)]
            if max(labels) >= len(self.classes):
                raise InputError(f"{name} has a label {max(labels)}, but {CLASSES} names {len(self.classes)} classes")
            self.labels = torch.tensor(labels, dtype=torch.int64)
        elif texts:
            self.classes = sorted(set(texts))
            self.labels = torch.tensor([self.classes.index(text) for text in texts], dtype=torch.int64)

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
            raise InputError(f"cannot read the image {self.file(i)}: the shard was truncated")
        return content

    def file(self, i: int) -> str:
        return f"{self._shards[self._shard[i]]}/{self._members[i]}"

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        with open(self._shards[shard], "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    def _read_labels(self, members: list[Member | None]) -> list[str]:
        """The text of each image's label; none if there are no labels, or some images have none."""
        texts = []
        for i, member in enumerate(members):
            text = b"" if member is None else self._read(int(self._shard[i]), *member[1:3]).strip()
            if not text:
                if any(members):
                    self.note = "; ".join(filter(None, (self.note, f"no labels: {self.file(i)} has none")))
                return []
            texts.append(text.decode(errors="replace"))
        return texts


def open_shards(pattern: str, split: Literal["train", "test"]) -> ImageDataset:
    """Open one split of the shards of a pattern, see `expand`; raise InputError if one is missing or damaged."""
    shards = expand(pattern)
    beside = shards[0].parent / TEST
    if split == "test" and beside.is_dir():
        return _open(f"{beside}/*.tar", expand(f"{beside}/*.tar"))
    images = _open(pattern, shards)
    if beside.is_dir():
        return images
    if images.labels is None:
        return images if split == "train" else Subset(images, range(0, len(images), 10))
    test = np.zeros(len(images), dtype=bool)
    for label in range(len(images.classes)):
        of_class = np.flatnonzero(images.labels.numpy() == label)
        test[of_class[held_out(len(of_class))]] = True
    return Subset(images, np.flatnonzero(test if split == "test" else ~test).tolist())


def is_folder_of_shards(path: Path) -> bool:
    """Whether a folder has tar files and neither images nor class folders."""
    entries = [entry for entry in os.scandir(path) if not entry.name.startswith(".")]
    folders = {entry.name for entry in entries if entry.is_dir()}
    endings = {Path(entry.name).suffix.lower() for entry in entries if entry.is_file()}
    return ".tar" in endings and folders <= {TEST} and not endings & set(EXTENSIONS)


def expand(pattern: str) -> list[Path]:
    """Expand `{000..015}`, `{a,b}` and `*` in a pattern to paths, in order; raise InputError if one does not exist."""
    found: list[Path] = []
    for name in _braces(str(Path(pattern).expanduser())):
        paths = sorted(map(Path, glob(name))) if "*" in name else [Path(name)]
        if not paths or not paths[0].is_file():
            raise InputError(f"no shard {name}: give existing ones, such as 'shards/{{000..015}}.tar'")
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


def _open(name: str, shards: list[Path]) -> ShardDataset:
    samples = [[sample for sample in read_index(shard) if _images(sample)] for shard in shards]
    if not any(samples):
        raise InputError(f"{name} has no images (image members end in {' '.join(EXTENSIONS)})")
    names = shards[0].with_name(CLASSES)
    return ShardDataset(name, shards, samples, names.read_text().splitlines() if names.is_file() else [])


_SUFFIXES = {extension.removeprefix(".") for extension in EXTENSIONS}


def _images(sample: Sample) -> list[Member]:
    """The first image `KEY.jpg` of a sample; if all have further dots, as `KEY.left.jpg`, all of them."""
    plain = [member for extension, member in sample.items() if extension in _SUFFIXES]
    return plain[:1] or [member for extension, member in sample.items() if extension.split(".")[-1] in _SUFFIXES]


def _note(samples: list[list[Sample]]) -> str:
    """The images that are left out, because their samples have others."""
    unused = []
    for sample in itertools.chain.from_iterable(samples):
        used = _images(sample)
        of_images = (m for extension, m in sample.items() if extension.split(".")[-1] in _SUFFIXES)
        unused += [member[3] for member in of_images if member not in used]
    return f"left out: {len(unused)} further images of samples, such as {unused[0]}" if unused else ""


def read_index(shard: Path) -> list[Sample]:
    """Return the samples of a shard, from its index if it exists; raise InputError if the shard is damaged."""
    index = shard.with_suffix(".idx")
    try:
        size = shard.stat().st_size
        with open(shard, "rb") as file:
            if file.read(2) == GZIP:
                raise InputError(f"the shard {shard} is compressed with gzip: decompress it, images are read by offset")
            file.seek(max(0, size - END))
            if size < END or size % 512 or any(file.read()):
                raise InputError(f"the shard {shard} is incomplete: copy or write it again")
        if index.is_file() and index.stat().st_mtime >= shard.stat().st_mtime:
            return _parse_index(index, size)
        return list(scan(shard))
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"cannot read the shard {shard} ({error}): copy or write it again") from error


def _parse_index(index: Path, size: int) -> list[Sample]:
    header, *lines = index.read_text().splitlines() or [""]
    try:
        version, count = header.split()
        samples = []
        for line in lines:
            words = line.split()
            members = [(e, int(o), int(s), n) for e, o, s, n in zip(*[iter(words)] * 4, strict=True)]
            if not members or any(offset + length > size - END for _, offset, length, _ in members):
                raise ValueError("an offset is behind the end of the shard")
            samples.append({member[0]: member for member in members})
        if version != INDEX or len(samples) != int(count):
            raise ValueError(f"its header gives {count} samples")
    except ValueError as error:
        raise InputError(
            f"{index} does not match its shard ({error}): delete it, the shard is then read without it"
        ) from error
    return samples


def scan(shard: Path) -> Iterator[Sample]:
    """Yield the samples of a tar file from the headers of its members, wherever the members of a sample are."""
    samples: dict[str, Sample] = {}
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            if member.isfile():
                key, extension = _split(member.name)
                samples.setdefault(key, {})[extension] = (extension, member.offset_data, member.size, member.name)
    yield from samples.values()


def _split(name: str) -> tuple[str, str]:
    """WebDataset's rule: the extension begins after the first dot of the base name."""
    folder, base = os.path.split(name)
    stem, _, extension = base.partition(".")
    return os.path.join(folder, stem), extension.lower()


def write_index(shard: Path, index: Path) -> int:
    """Write the index of a shard and return the number of its samples."""
    samples = list(scan(shard))
    lines = [" ".join(f"{e} {o} {s} {n}" for e, o, s, n in sample.values()) for sample in samples]
    index.write_text("\n".join([f"{INDEX} {len(samples)}", *lines]) + "\n")
    return len(samples)
