"""Atomic file writing: a file has its old content or the whole new one, also after a crash."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError

PROBE_BYTES = 1 << 16
NO_ROOM = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT)))


def is_for_lack_of_room(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, was raised because the disk or the user's quota was full."""
    while error is not None:
        if any(reason in str(error) for reason in NO_ROOM):  # libraries may drop errno, but keep the message
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def needs_room(path: Path) -> Iterator[None]:
    """Raise InputError if the body, which writes to `path`, fails because the disk is full."""
    try:
        yield
    except Exception as error:
        if not is_for_lack_of_room(error):
            raise
        raise InputError(
            f"the disk is full: {path} could not be written, and what was saved before is whole; make room and go on "
            "from there (a training with --resume)"
        ) from error


def check_writable(folder: Path) -> None:
    """Check that files can be written to a folder, which may not exist yet. Leaves nothing behind.

    Raises:
        InputError: the folder or its nearest existing parent is a file or read-only, or the disk is full.
    """
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"{existing} is not a folder: give a folder for the results")
    try:
        with needs_room(existing), tempfile.TemporaryFile(dir=existing, buffering=0) as file:
            file.write(bytes(PROBE_BYTES))
            os.fsync(file.fileno())
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot write to {existing}: {reason}; give a folder that this user can write to") from error


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)` and move the result to `path`.

    Args:
        path: the file; its folder is created if missing.
        write: function that writes the content to the path it is given.

    Raises:
        InputError: if the disk is full; the old file is then unchanged.
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
        sync(path.parent)  # the rename must survive a power failure


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8; file names that are not UTF-8 are written with escapes."""
    write_bytes(path, text.encode(errors="backslashreplace"))
