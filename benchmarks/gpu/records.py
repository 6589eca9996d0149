"""What benchmarks/gpu/run_all.sh keeps: a line of JSON for every result, written as soon as it is known.

So whatever is cut off takes nothing with it. DSPNET_BENCH_RESULTS: the file; without it nothing is kept.
DSPNET_BENCH_LOCK: a file that says who has the GPU to itself.
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
    """Append a line."""
    if path := os.environ.get("DSPNET_BENCH_RESULTS"):
        line = json.dumps({"kind": kind, **fields}) + "\n"
        with open(path, "ab", buffering=0) as file:  # one write: other processes append as well
            file.write(line.encode())


def read(path: str | Path | None = None) -> list[dict[str, Any]]:
    """All lines, but for one that was cut off; by default of the file that is being written."""
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
def alone() -> Iterator[None]:
    """The GPU to oneself: others of the same run that want it so wait."""
    path = os.environ.get("DSPNET_BENCH_LOCK")
    if not path:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing gives it back
