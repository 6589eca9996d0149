"""Files that are there as a whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError

NO_ROOM = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT)))


def is_for_lack_of_room(error: BaseException | None) -> bool:
    """Whether the disk, or the user's share of it, was full when this error or one that it came from was raised."""
    while error is not None:
        if any(reason in str(error) for reason in NO_ROOM):  # libraries keep the words, but not always the number
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def needs_room(path: Path) -> Iterator[None]:
    """What is done inside writes to `path`; InputError if there is no room for it."""
    try:
        yield
    except Exception as error:
        if not is_for_lack_of_room(error):
            raise
        raise InputError(
            f"the disk is full: {path} could not be written, and what was saved before is whole; make room and go on "
            "from there (a training with --resume)"
        ) from error


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)` and move the result to `path`: readers see the old file or the whole new one.

    InputError if the disk is full; the old file is still there then.
    """
    with needs_room(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)  # the rename itself must survive a power cut


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())
