"""Results of benchmarks/gpu/run_all.sh: one JSON line per result, written immediately so that timeouts lose nothing.

DSPNET_BENCH_RESULTS: the file; without it nothing is written. DSPNET_BENCH_LOCK: a lock file for exclusive use of the
GPU.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write(kind: str, **fields: Any) -> None:
    """Append a line of the given kind."""
    if path := os.environ.get("DSPNET_BENCH_RESULTS"):
        line = json.dumps({"kind": kind, **fields}) + "\n"
        with open(path, "ab", buffering=0) as file:  # a single write, because other processes append too
            file.write(line.encode())


def read(path: str | Path | None = None) -> list[dict[str, Any]]:
    """All complete lines of a file [DSPNET_BENCH_RESULTS]."""
    path = path or os.environ.get("DSPNET_BENCH_RESULTS")
    if not path or not Path(path).exists():
        return []
    lines = []
    for line in Path(path).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


@contextmanager
def exclusive_gpu() -> Iterator[None]:
    """Hold the lock of the GPU, if DSPNET_BENCH_LOCK is set."""
    path = os.environ.get("DSPNET_BENCH_LOCK")
    if not path:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock
