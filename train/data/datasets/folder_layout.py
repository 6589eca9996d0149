"""The layouts of image folders: splits, image folders of annotated datasets, numbered parts, folders around a set."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from dspnet_fast.errors import InputError

from .folder_files import IMAGE_FOLDERS, folders, is_annotation, is_image

_SET = r"(set|data|images?|imgs|split)?"
_WORDS = {
    "train": re.compile(rf"train(ing|val)?{_SET}"),
    "val": re.compile(rf"(val(id(ation)?)?|dev(el(opment)?)?|eval(uation)?){_SET}"),
    "test": re.compile(rf"test(ing)?{_SET}"),
}
_REST = {"set", "data", "dataset", "image", "images", "imgs", "img", "split", "folder"}
_NO_CLASS = re.compile(r"unlabell?ed|extra|raw|pred(ictions?)?", re.IGNORECASE)
_PART = re.compile(
    r"(fold|part|batch|split|subset|chunk|shard|set|dis[kc]|folder|dir|images?|imgs|voc)[ _-]*\d+", re.IGNORECASE
)


def split_of(name: str) -> tuple[str, tuple[str, ...]] | None:
    """The split that a folder's name means and its other words, or None.

    Training, valid and test_set have no other words; those of trainA are ("a",), those of seg_test ("seg",).
    """
    words = re.split(r"[ _.-]+", re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Za-z])(?=\d)", " ", name.strip()).lower())
    for split, pattern in _WORDS.items():
        for place, word in enumerate(words):
            if pattern.fullmatch(word):
                others = (*words[:place], *words[place + 1 :])
                return split, tuple(other for other in others if other not in _REST and not other.isdigit())
    return None


def splits(root: Path) -> tuple[dict[str, Path], list[Path]]:
    """Folders of splits by name, and all other folders.

    Splits are folders whose names differ in the word for the split: a training split and another one. A lone `train`
    among other folders is a class, unless it has classes of its own and the others have none.

    Raises:
        InputError: several folders are the same split.
    """
    inside = folders(root)
    groups: dict[tuple[str, ...], dict[str, list[Path]]] = {}
    for folder in inside:
        if (found := split_of(folder.name)) is not None:
            groups.setdefault(found[1], {}).setdefault(found[0], []).append(folder)
    paired = {words: group for words, group in groups.items() if "train" in group and len(group) > 1}
    if paired:  # further training splits are an error, except for masks
        paired = {words: group for words, group in groups.items() if "train" in group}
        paired = {words: group for words, group in paired.items() if not is_annotation(" ".join(words))} or paired
    elif () in groups and _are_splits_alone(groups[()], inside):
        paired = {(): groups[()]}
    chosen = [(name, folder) for group in paired.values() for name, several in group.items() for folder in several]
    for name in _WORDS:
        several = [folder.name for found, folder in chosen if found == name]
        if len(several) > 1:
            raise InputError(
                f"{root} has the folders {' and '.join(several)}: give one of them, or a list of folders, as --data"
            )
    return dict(chosen), [folder for folder in inside if folder not in dict(chosen).values()]


def _are_splits_alone(group: dict[str, list[Path]], inside: Sequence[Path]) -> bool:
    """Whether all folders are one split, or there is one `train` with classes, and the others have none or the same."""
    alone = [folder for several in group.values() for folder in several]
    if len(alone) == len(inside) or "train" not in group or len(alone) > 1:
        return len(alone) == len(inside)
    classes = class_names(alone[0])
    others = [folder for folder in inside if folder not in alone and not _NO_CLASS.fullmatch(folder.name)]
    return len(classes) > 1 and not any(class_names(other) - classes for other in others)


def class_names(folder: Path) -> set[str]:
    """Names of the subfolders with images; none for a folder that has images itself."""
    return set() if has_loose_images(folder) else {inner.name for inner in folders(folder) if has_images(inner)}


def content(path: Path, in_split: bool = False, classes: Collection[str] = ()) -> Path:
    """The folder of the classes: inside folders that hold a single folder with images, as archives make them.

    Of an annotated dataset the folder of its images.

    Args:
        path: the folder.
        in_split: whether it is a split; otherwise the result may be a folder of splits.
        classes: names of folders that are not entered.
    """
    if has_loose_images(path) or (not in_split and splits(path)[0]):
        return path
    inside = folders(path)
    images = [folder for folder in inside if folder.name.lower() in IMAGE_FOLDERS]
    if len(images) == 1 and len(inside) > 1 and all(f in images or is_annotation(f.name) for f in inside):
        return content(images[0], in_split, classes)
    images = [folder for folder in inside if has_images(folder)][:2]
    if len(images) != 1 or images[0].name in classes or has_loose_images(images[0]):
        return path
    return content(images[0], in_split, classes)


def has_loose_images(folder: Path) -> bool:
    """Whether a folder has images that are in no subfolder."""
    with os.scandir(folder) as found:
        return any(is_image(entry.name) and entry.name[0] != "." and entry.is_file() for entry in found)


def has_images(folder: Path) -> bool:
    """Whether a folder has images at any depth."""
    met: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in met:
            continue
        met.add((status.st_dev, status.st_ino))
        if has_loose_images(here):
            return True
        waiting += folders(here)
    return False


def numbered_parts(classes: Sequence[Path]) -> bool:
    """Whether all folders are numbered parts of one set, such as fold1 and fold2, or images_001 to images_012."""
    return len(classes) > 1 and all(_PART.fullmatch(folder.name) for folder in classes)


def check_classes(root: Path, classes: Sequence[Path]) -> None:
    """Raise InputError if a class folder has splits of its own."""
    for folder in classes:
        found = {} if has_loose_images(folder) else splits(folder)[0]
        if len(found) > 1:
            names = " and ".join(inner.name for inner in found.values())
            raise InputError(
                f"{folder} has the splits {names}, so the folders of {root} are no classes: give {folder} as --data, "
                f"or --unlabelled to take all images of {root}"
            )


def class_notes(by_class: dict[str, list[str]], classes: Sequence[Path]) -> list[str]:
    """Notes about names of classes that are probably a mistake."""
    notes = []
    spelled: dict[str, str] = {}
    for name in by_class:
        if (other := spelled.setdefault(name.strip().casefold(), name)) != name:
            notes.append(f"the classes {other} and {name} differ only in capitals or spaces")
    known = [folder for folder in classes if folder.name in by_class]
    first = class_names(known[0])
    if len(known) > 1 and len(first) > 1 and all(class_names(folder) == first for folder in known):
        names = ", ".join(sorted(first)[:3])
        notes.append(f"every class has the same folders ({names}): if these are the classes, give one folder as --data")
    return notes
