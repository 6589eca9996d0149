"""Images in WebDataset shards: tar files whose members belong together by name, such as `0001.jpg` and `0001.cls`.

An index beside each shard (`000.idx`, the format of DALI's wds2idx) gives the offsets of the members for random access;
without it the headers of the shard are read once. `open_images` describes the layout of shards.
"""

from __future__ import annotations

import itertools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from dspnet_fast.errors import InputError

from .decoders import describe_content
from .folder_files import EXTENSIONS, describe_left_out, ending
from .folder_layout import has_images, split_of, splits
from .images import ImageDataset, Subset, decode, held_out

CLASSES = "classes.txt"  # beside the shards: one class name per line
TEST = "test"  # folder of the test split, beside the shards
LABEL = "cls"
INDEX = "v1.2"
GZIP = b"\x1f\x8b"
USTAR = 257  # place of a tar header's magic number
MAX_CLASSES = 100_000  # larger labels are names, such as numbers of products
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
        self.named = not all(text.isdigit() and int(text) < max(MAX_CLASSES, len(classes)) for text in texts)
        if texts and not self.named:
            labels = list(map(int, texts))
            self.classes = classes or [str(label) for label in range(max(labels) + 1)]
            if max(labels) >= len(self.classes):
                raise InputError(f"{name} has a label {max(labels)}, but {CLASSES} names {len(self.classes)} classes")
            self.labels = torch.tensor(labels, dtype=torch.int64)
        elif texts:
            self.classes = sorted(set(texts))
            self.labels = _indices(texts, self.classes)

    def use_classes(self, classes: list[str]) -> None:
        """Number the labels, which are names, by other classes; InputError if a name is not among them."""
        assert self.labels is not None
        if unknown := sorted(set(self.classes) - set(classes)):
            raise InputError(f"the class {unknown[0]!r} of {self.name} is not among the training images")
        self.labels = _indices([self.classes[label] for label in self.labels.tolist()], classes)
        self.classes = classes

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
        """The text of each image's label; none if there are no labels, or they name no classes."""
        texts = []
        for i, member in enumerate(members):
            text = b"" if member is None else self._read(int(self._shard[i]), *member[1:3]).strip()
            if text in (b"", b"-1"):
                if any(members):
                    self._add_note(f"no labels: {self.file(i)} has none")
                return []
            texts.append(text.decode(errors="replace"))
        if 1 < len(texts) == len(set(texts)):
            self._add_note("no labels: every image has another one")
            return []
        return texts

    def _add_note(self, note: str) -> None:
        self.note = "; ".join(filter(None, (self.note, note)))


def _indices(names: list[str], classes: list[str]) -> torch.Tensor:
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[name] for name in names], dtype=torch.int64)


def open_shards(pattern: str, split: Literal["train", "test"]) -> ImageDataset:
    """Open one split of the shards of a pattern, see `expand`; raise InputError if one is missing or damaged."""
    shards = expand(pattern)
    return _open_split(pattern, shards, _tars(shards[0].parent / TEST), split)


def open_folder_of_shards(path: Path, split: Literal["train", "test"]) -> ImageDataset | None:
    """Open one split of a folder of shards; None if the folder has none.

    A folder of shards has tar files, whose names may mean splits as `train-000.tar` does, and neither images nor class
    folders; or it has folders of such files, whose names mean splits.
    """
    entries = [entry for entry in os.scandir(path) if not entry.name.startswith(".")]
    inside = {entry.name for entry in entries if entry.is_dir()}
    if {ending(entry.name) for entry in entries if entry.is_file()} & set(EXTENSIONS):
        return None
    if shards := _tars(path):
        if not inside <= {TEST}:
            return None
        names = [split_of(shard.stem) for shard in shards]
        by_split = {
            kind: [shard for shard, name in zip(shards, names, strict=True) if name and name[0] == kind]
            for kind in ("train", "test", "val")
        }
        tests = by_split["test"] or by_split["val"]
        if all(names) and by_split["train"] and tests:
            return _open_split(str(path), by_split["train"], tests, split)
        return _open_split(str(path), shards, _tars(path / TEST), split)
    found = splits(path)[0] if inside else {}
    if "train" not in found or not (shards := _tars(found["train"])) or has_images(found["train"]):
        return None
    tests = [tar for name in ("test", "val") if name in found for tar in _tars(found[name])[:1]]
    return _open_split(str(path), shards, _tars(tests[0].parent) if tests else [], split)


def _tars(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def _open_split(name: str, shards: list[Path], tests: list[Path], split: Literal["train", "test"]) -> ImageDataset:
    """The training shards, or the test shards; without test shards a tenth of each class is the test split."""
    if split == "test" and tests:
        images = _open(str(tests[0].parent), tests)
        if images.labels is not None and images.named:
            images.use_classes(_open(name, shards).classes)
        return images
    images = _open(name, shards)
    if tests:
        return images
    if images.labels is None:
        return images if split == "train" else Subset(images, range(0, len(images), 10))
    test = np.zeros(len(images), dtype=bool)
    for label in range(len(images.classes)):
        of_class = np.flatnonzero(images.labels.numpy() == label)
        test[of_class[held_out(len(of_class))]] = True
    return Subset(images, np.flatnonzero(test if split == "test" else ~test).tolist())


def expand(pattern: str) -> list[Path]:
    """Expand `{000..015}`, `{a,b}`, `*` and `::` in a pattern to paths, in order; InputError if one is missing."""
    found: list[Path] = []
    for name in (name for part in pattern.split("::") for name in _braces(str(Path(part).expanduser()))):
        paths = sorted(map(Path, glob(name))) if has_magic(name) and not Path(name).is_file() else [Path(name)]
        if not paths or not paths[0].is_file():
            raise InputError(f"no shard {name}: give existing files, such as 'shards/{{000..015}}.tar'")
        found += paths
    if not found:
        raise InputError(f"{pattern} names no shard: ranges go up, as in 'shards/{{000..015}}.tar'")
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
    classes = names.read_text("utf-8", errors="surrogateescape").splitlines() if names.is_file() else []
    return ShardDataset(name, shards, samples, classes)


_SUFFIXES = {extension.removeprefix(".") for extension in EXTENSIONS}


def _images(sample: Sample) -> list[Member]:
    """The first image `KEY.jpg` of a sample; if all have further dots, as `KEY.left.jpg`, all of them."""
    plain = [member for extension, member in sample.items() if extension in _SUFFIXES]
    return plain[:1] or [member for extension, member in sample.items() if extension.split(".")[-1] in _SUFFIXES]


def _note(samples: list[list[Sample]]) -> str:
    """The members that are left out: images, because their samples have others, and members of other kinds."""
    unused, others, folders = [], Counter[str](), set()
    for sample in itertools.chain.from_iterable(samples):
        used = _images(sample)
        folders |= {os.path.dirname(member[3]) for member in used}
        for extension, member in sample.items():
            kind = extension.split(".")[-1]
            if kind in _SUFFIXES and member not in used:
                unused.append(member[3])
            elif kind not in _SUFFIXES and extension != LABEL:
                others[f".{kind}" if kind else "files without an ending"] += 1
    phrases = [f"{len(unused)} further images of samples, such as {unused[0]}"] if unused else []
    phrases += describe_left_out(others.items())
    notes = [f"left out: {', '.join(phrases)}"] if phrases else []
    if len(folders) > 1 and not any(LABEL in sample for sample in itertools.chain.from_iterable(samples)):
        notes.append("no labels: folders in shards are no classes")
    return "; ".join(notes)


def read_index(shard: Path) -> list[Sample]:
    """Return the samples of a shard, from its index if it exists; raise InputError if the shard is damaged."""
    index = shard.with_suffix(".idx")
    try:
        size = shard.stat().st_size
        with open(shard, "rb") as file:
            start = file.read(512)
            if start.startswith(GZIP):
                raise InputError(f"the shard {shard} is compressed with gzip: decompress it, images are read by offset")
            is_tar = start[USTAR : USTAR + 5] == b"ustar" or (len(start) == 512 and not any(start))  # or an empty one
            if not is_tar and (what := describe_content(start)):
                raise InputError(f"the shard {shard} is no tar file, it is {what}")
            file.seek(max(0, size - END))
            if size < END or size % 512 or any(file.read()):
                raise InputError(f"the shard {shard} is incomplete: copy or write it again")
        if index.is_file() and index.stat().st_mtime >= shard.stat().st_mtime:
            return _parse_index(index, size)
        return list(scan(shard))
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"cannot read the shard {shard} ({error}): copy or write it again") from error


def _parse_index(index: Path, size: int) -> list[Sample]:
    header, *lines = index.read_text("utf-8", errors="surrogateescape").splitlines() or [""]
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
    samples: dict[str, list[Sample]] = {}
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            key, extension = _split(member.name)
            if member.isfile() and not os.path.basename(key).startswith("._") and "__MACOSX" not in key:
                of_key = samples.setdefault(key, [{}])
                if extension in of_key[-1]:  # of another set that was appended to the shard
                    of_key.append({})
                of_key[-1][extension] = (extension, member.offset_data, member.size, member.name)
    yield from itertools.chain.from_iterable(samples.values())


def _split(name: str) -> tuple[str, str]:
    """WebDataset's rule: the extension begins after the first dot of the base name."""
    folder, base = os.path.split(name)
    hidden = base[: len(base) - len(base.lstrip("."))]
    stem, _, extension = base.lstrip(".").partition(".")
    stem = hidden + stem
    return os.path.join(folder, stem), extension.lower()


def write_index(shard: Path, index: Path) -> int:
    """Write the index of a shard and return the number of its samples."""
    samples = list(scan(shard))
    lines = [" ".join(f"{e} {o} {s} {n}" for e, o, s, n in sample.values()) for sample in samples]
    index.write_text("\n".join([f"{INDEX} {len(samples)}", *lines]) + "\n", "utf-8", errors="surrogateescape")
    return len(samples)
