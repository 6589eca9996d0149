"""The image files of a folder, each once, and the files that are left out."""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import features

from .arrays import ARRAYS, is_array

EXTENSIONS = tuple(
    [
        ".bmp",
        ".dib",
        ".gif",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tga",
        ".tif",
        ".tiff",
        ".webp",
    ]
    + [".avif"] * bool(features.check("avif"))
    + [".heic", ".heif"] * (importlib.util.find_spec("pillow_heif") is not None)
)
HINTS = {".heic": "pip install pillow-heif", ".heif": "pip install pillow-heif", ".avif": "Pillow without AVIF"}
HINTS |= {".dcm": "pip install 'dspnet-fast[dicom]'"}
HINTS |= dict.fromkeys((".zip", ".tar", ".tgz", ".gz", ".xz", ".bz2", ".zst", ".7z", ".rar"), "unpack them")
DATA_USED = "data_used.json"  # a folder with this file is a run directory
RESULTS = {"checkpoints", "evaluation", "exported", "features", "report", "tensorboard"}  # folders in it
# Folders that archives, photo software and file systems add.
FOREIGN = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}

# Names, in lower case, of the image folders of annotated datasets (VOC, YOLO, Roboflow, Cityscapes).
IMAGE_FOLDERS = ("image", "images", "jpegimages", "img", "imgs", "leftimg8bit", "rgb")
_ANNOTATIONS = re.compile(
    r"(labels?|annot(ation)?s?|masks?|imagesets|segmentation(class|object|s)?|trimaps?|depths?|disparit(y|ies)|gt(fine|coarse)?"
    r"|ground[ _-]?truths?)([ _-]?\w{1,4})?"
)
_MASK = re.compile(r"[ _-](mask|seg|segmentation|label|gt)s?([ _-]?\d+)?\.\w+$", re.IGNORECASE)


def is_annotation(name: str) -> bool:
    """Whether a folder beside a folder of images has annotations, such as masks, by its name."""
    return _ANNOTATIONS.fullmatch(name.lower()) is not None


def is_image(name: str) -> bool:
    """Whether a file name has the ending of an image or of an array."""
    return name.lower().endswith(EXTENSIONS + ARRAYS)


def ending(name: str) -> str:
    """The ending of a file in lower case, as `Walk.left_out` counts it."""
    return Path(name).suffix.lower() or "files without an ending"


class Walk:
    """Lists the image files of folders at any depth. Links to files or folders that were met before are left out.

    Args:
        met: folders that count as met.

    Attributes:
        left_out: number of files, by ending or by reason.
    """

    def __init__(self, *met: Path) -> None:
        self.left_out: Counter[str] = Counter()
        self._folders = {file_identity(folder) for folder in met}

    def files(self, root: Path) -> list[str]:
        """Image files in a folder and its subfolders, sorted by path."""
        return self.lists([root])[0]

    def lists(self, roots: Sequence[Path]) -> list[list[str]]:
        """Image files of each folder. Links count after everything that they may lead to."""
        found: list[list[str]] = [[] for _ in roots]
        links: list[tuple[int, Path]] = []
        for index, root in enumerate(roots):
            if root.is_symlink():
                links.append((index, root))
            else:
                self._scan(index, root, found[index], links)
        to_files = []
        for index, path in links:  # grows
            if path.is_dir():
                self._scan(index, path, found[index], links)
            elif path.exists():
                to_files.append((index, path))
            else:
                self.left_out["links that lead nowhere"] += 1
        met = {file_identity(file) for files in found for file in files} if to_files else set()
        for index, path in to_files:
            if (identity := file_identity(path)) in met:
                self.left_out["links to files met before"] += 1
            else:
                met.add(identity)
                found[index].append(str(path))
        return without_arrays([sorted(files) for files in found], self.left_out)

    def _scan(self, index: int, folder: Path, found: list[str], links: list[tuple[int, Path]]) -> None:
        if (identity := file_identity(folder)) in self._folders:
            self.left_out["links to folders met before"] += 1
            return
        self._folders.add(identity)
        inside = entries(folder)
        masks = _masks([entry.name for entry in inside])
        annotated = any(entry.name.lower() in IMAGE_FOLDERS and entry.is_dir() for entry in inside)
        for entry in inside:
            if annotated and is_annotation(entry.name) and entry.is_dir():
                self.left_out[f"folders {entry.name} beside images"] += 1
            elif entry.is_symlink() and (is_image(entry.name) or entry.is_dir()):
                links.append((index, Path(entry.path)))
            elif entry.is_dir():
                self._scan(index, Path(entry.path), found, links)
            elif entry.name in masks:
                self.left_out["masks beside their images"] += 1
            elif is_image(entry.name):
                found.append(entry.path)
            else:
                self.left_out[ending(entry.name)] += 1


def _masks(names: list[str]) -> set[str]:
    """Names such as x_mask.png, if there is an image x too."""
    found = {name: name[: match.start()] for name in names if (match := _MASK.search(name))}
    stems = {Path(name).stem for name in names if is_image(name)} if found else set()
    return {name for name, stem in found.items() if stem in stems and is_image(name)}


def without_arrays(found: list[list[str]], left_out: Counter[str]) -> list[list[str]]:
    """Drop arrays from lists of files that have images too: these are masks, features and the like of the images."""
    arrays = [Path(file).suffix.lower() for files in found for file in files if is_array(file)]
    if len(arrays) == sum(map(len, found)):
        return found
    left_out.update(arrays)
    return [[file for file in files if not is_array(file)] for files in found]


def file_identity(path: str | Path) -> tuple[int, int]:
    """The same for all paths of a file or folder."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Entries of a folder, sorted by name, without hidden ones, FOREIGN folders, and results of this program."""
    with os.scandir(folder) as found:
        inside = sorted(found, key=lambda entry: entry.name)
    results = RESULTS if any(entry.name == DATA_USED for entry in inside) else ()
    return [
        entry
        for entry in inside
        if not entry.name.startswith(".")
        and entry.name not in FOREIGN
        and entry.name not in results
        and not (entry.is_dir() and os.path.exists(os.path.join(entry.path, DATA_USED)))
    ]


def folders(folder: Path) -> list[Path]:
    """Subfolders, sorted by name."""
    return [Path(entry.path) for entry in entries(folder) if entry.is_dir()]


def describe_left_out(left_out: Iterable[tuple[str, int]]) -> Iterator[str]:
    """Phrases such as "40 files ending in .heic (pip install pillow-heif)", most frequent first."""
    for reason, count in sorted(left_out, key=lambda item: (-item[1], item[0])):
        hint = f" ({HINTS[reason]})" if reason in HINTS else ""
        yield f"{count} files ending in {reason}{hint}" if reason.startswith(".") else f"{count} {reason}"
