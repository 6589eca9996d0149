"""Locks of folders that one process at a time may write to, such as run directories."""

from __future__ import annotations

import errno
import os
import socket
import sys
from pathlib import Path
from typing import IO

from dspnet_fast.errors import InputError

if sys.platform == "win32":
    import msvcrt

    def _lock_exclusively(file: IO[str]) -> None:
        file.seek(1 << 30)  # far from the text: a locked byte cannot be read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock_exclusively(file: IO[str]) -> None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


_locks: dict[Path, IO[str]] = {}  # held by this process; closing a file would release its lock


def lock(path: Path, what: str = "the run in", option: str = "--out") -> None:
    """Lock a file until this process ends; without effect if this process has locked it before.

    Args:
        path: the file; its folder is the one that is written to.
        what: for the error message, what the folder is.
        option: for the error message, the option that names another folder.

    Raises:
        InputError: another process has the lock.
    """
    if path in _locks:
        return
    file = open(path, "a+")  # noqa: SIM115  (open until the process ends)
    try:
        _lock_exclusively(file)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InputError(
                f"{holder} is writing to {what} {path.parent}: wait for its end, or choose another {option}"
            ) from error
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        print(f"this file system has no locks: make sure that no other process writes to {path.parent}")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _locks[path] = file
