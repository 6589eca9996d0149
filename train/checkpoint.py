"""Checkpoints of a run: written atomically, read without unpickling anything but tensors and plain values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from dspnet_fast.errors import InputError

from .atomic import write_atomically

FORMAT = 1
KEEP = 2


def _files(folder: Path) -> list[tuple[int, Path]]:
    """Steps and paths of the checkpoints in a folder, oldest first."""
    found = []
    for path in folder.glob("step-*.pt"):
        match = re.fullmatch(r"step-(\d+)\.pt", path.name)
        if match:
            found.append((int(match.group(1)), path))
    return sorted(found)


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` (tensors, numbers, strings, lists and dictionaries of them) and drop all but the newest two."""
    path = folder / f"step-{step:08d}.pt"
    write_atomically(path, lambda temporary: torch.save({"format": FORMAT, "step": step, **state}, temporary))
    for _, old in _files(folder)[:-KEEP]:
        old.unlink()
    return path


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder, None if it has none."""
    files = _files(folder)
    return files[-1][1] if files else None


def latest_step(folder: Path) -> int:
    """The step of the newest checkpoint of a folder, 0 if it has none."""
    files = _files(folder)
    return files[-1][0] if files else 0


def newest_of_run(out: Path) -> Path:
    """The newest checkpoint of a run directory; InputError if there is none."""
    path = latest(out / "checkpoints")
    if path is None:
        raise InputError(f"{out} holds no checkpoint of a run: give the --out of a pretraining that has saved one")
    return path


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint; InputError if the file is none, is damaged or was written by another version."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # zip, pickle and io errors of many types, all of them mean the same to the user
        raise InputError(
            f"{path} is not a readable checkpoint ({type(error).__name__}): remove it to continue from the one before"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of this version of dspnet-fast (format {FORMAT})")
    return state
