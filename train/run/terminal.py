"""Standard output and error that cannot end a run: their reader may exit, and their encoding may lack a character."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from typing import Any, TextIO

# The reader of a pipe has exited; the terminal was closed; the disk of the file that output is redirected to is full.
GONE = (errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EDQUOT)
REPLACEMENTS = {"±": "+-", "×": "x", "…": "...", "–": "-", "→": "->"}


def _replace(error: UnicodeError) -> tuple[str, int]:
    """A codecs error handler: plain spellings, bytes of file names in hexadecimal, and ? for everything else."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(REPLACEMENTS.get(character) or _plain(character) for character in text), error.end


def _plain(character: str) -> str:
    byte = ord(character) - 0xDC00  # file names that are not UTF-8 hold their bytes as surrogates (PEP 383)
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else "?"


codecs.register_error("dspnet.plain", _replace)


class Lasting:
    """A text stream that drops its output once nobody can read it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text; return its length."""
        try:
            return self._stream.write(text)
        except OSError as error:
            return self._drop(error, len(text))

    def flush(self) -> None:
        """Write the buffered text."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error, 0)

    def _drop(self, error: OSError, written: int) -> int:
        """From now on write to /dev/null, also the text that Python flushes when the process ends."""
        if error.errno not in GONE:
            raise error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect_output() -> None:
    """Replace sys.stdout and sys.stderr by streams that no reader, no character and no closed handle can break."""
    for handle in range(3):
        try:
            os.fstat(handle)
        except OSError:  # closed by the caller: without this the next file that is opened would receive the output
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115  (open until the process ends)
        if isinstance(stream, io.TextIOWrapper):  # not under pytest, which captures
            stream.reconfigure(errors="dspnet.plain")
            setattr(sys, name, Lasting(stream))
