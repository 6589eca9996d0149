"""Unreadable images: replaced by the next readable image, counted by name, and limited in number."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from dspnet_fast.errors import InputError

from .datasets.images import ImageDataset

T = TypeVar("T")
Unreadable = tuple[str, str]  # name and error message of an image


class BadImages:
    """The unreadable images of a run, each counted once.

    Args:
        limit: the number of unreadable images that the run allows.
        known: error messages by image name, of the images counted before the run was interrupted.
        report: called with each line; by default `new_messages` returns them.

    Attributes:
        found: error messages of all counted images by name.

    Raises:
        InputError: more images than `limit` are known.
    """

    def __init__(
        self,
        limit: int = 0,
        known: Mapping[str, str] | None = None,
        report: Callable[[str], object] | None = None,
    ) -> None:
        self.limit = limit
        self.found: dict[str, str] = dict(known or {})
        self._messages: list[str] = []
        self._report = report or self._messages.append
        self._warned: set[str] = set()
        if len(self) > limit:
            raise InputError(
                f"--max-bad-images {limit}, but the run has left out {len(self)} already: give at least {len(self)}"
            )

    def __len__(self) -> int:
        return len(self.found)

    def add(self, unreadable: list[Unreadable]) -> None:
        """Count images that were not counted before; raise InputError at the first one above the limit."""
        for name, reason in unreadable:
            if name in self.found:
                continue
            if len(self) == self.limit:
                raise InputError(reason + (f"; that is more than --max-bad-images {self.limit}" if self.limit else ""))
            self.found[name] = reason
            self._report(f"left out, bad image {len(self)} of {self.limit} allowed: {reason}")

    def add_warnings(self, warned: list[Unreadable]) -> None:
        """Note warnings of decoders, by file and text: one line for each text, whatever its numbers."""
        for name, text in warned:
            kind = re.sub(r"\d+", "N", text)
            if kind not in self._warned:
                self._warned.add(kind)
                self._report(f"decoder warning: {text} ({name or 'an image'}; further ones are not shown)")

    def new_messages(self) -> list[str]:
        """Return a line for each image counted, and each kind of decoder warning, since the last call."""
        messages = self._messages.copy()
        self._messages.clear()
        return messages


def load_or_next(images: ImageDataset, i: int, limit: int, load: Callable[[int], T], unreadable: list[Unreadable]) -> T:
    """Load image i, or the next readable one after it.

    The result depends on i and the dataset only, so it is the same in a resumed run, in another batch and on another
    rank.

    Args:
        images: the dataset.
        i: index of the image.
        limit: how many unreadable images to skip.
        load: loads the image of an index; raises InputError if that fails.
        unreadable: receives the name and the error message of each skipped image.

    Raises:
        InputError: `limit` + 1 images in a row are unreadable.
    """
    for k in range(limit + 1):
        candidate = (i + k) % len(images)
        try:
            return load(candidate)
        except InputError as error:
            unreadable.append((images.file(candidate), str(error)))
    raise InputError(unreadable[-1][1])
