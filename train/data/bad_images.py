"""Images that cannot be used: replaced by a neighbour, counted by name, and too many in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from dspnet_fast.errors import InputError

from .datasets.images import ImageSet

T = TypeVar("T")
Refusal = tuple[str, str]  # the image's name, and what is wrong with it


class BadImages:
    """The images of a run that could not be used, each counted once.

    Args:
        limit: how many there may be.
        known: those that were counted before the run was interrupted. InputError if they are too many already.

    Attributes:
        found: names of all that were counted, and what is wrong with each.
    """

    def __init__(self, limit: int = 0, known: Mapping[str, str] | None = None) -> None:
        self.limit = limit
        self.found: dict[str, str] = dict(known or {})
        self._news: list[str] = []
        if len(self) > limit:
            raise InputError(
                f"--max-bad-images {limit} is less than the run has left out already: give at least {len(self)}"
            )

    def __len__(self) -> int:
        return len(self.found)

    def note(self, refusals: list[Refusal]) -> None:
        """Count images that are not known yet; InputError at the first that is one too many."""
        for name, reason in refusals:
            if name in self.found:
                continue
            if len(self) == self.limit:
                raise InputError(reason + (f"; more bad ones than --max-bad-images {self.limit}" if self.limit else ""))
            self.found[name] = reason
            self._news.append(f"left out, bad image {len(self)} of {self.limit} allowed: {reason}")

    def news(self) -> list[str]:
        """A line for each image counted since the last call."""
        news, self._news = self._news, []
        return news


def load_or_next(images: ImageSet, i: int, limit: int, load: Callable[[int], T], refusals: list[Refusal]) -> T:
    """load(i), or of the next image in the set that can be used; those that cannot are added to `refusals`.

    A function of i and the images alone, so that a resumed run, another batch and another rank see the same. After
    `limit` images it is a matter for the one who counts: the last InputError is raised.
    """
    for k in range(limit + 1):
        candidate = (i + k) % len(images)
        try:
            return load(candidate)
        except InputError as error:
            refusals.append((images.file(candidate), str(error)))
    raise InputError(refusals[-1][1])
