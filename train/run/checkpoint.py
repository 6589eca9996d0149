"""Checkpoints of a run: written atomically, with a digest of their contents.

Reading unpickles tensors and plain values only.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspnet_fast.atomic import write_atomically
from dspnet_fast.errors import InputError

from .fingerprint import digest

FORMAT = 2
KEEP = 2


def _files(folder: Path) -> list[tuple[int, Path]]:
    """Steps and paths of the checkpoints in a folder, oldest first."""
    found = []
    for path in folder.glob("step-*.pt"):
        match = re.fullmatch(r"step-(\d+)\.pt", path.name)
        if match:
            found.append((int(match.group(1)), path))
    return sorted(found)


def save(folder: Path, step: int, state: dict[str, Any], keep: int = KEEP, keep_every: int = 0) -> Path:
    """Write a checkpoint, then delete old ones.

    Checkpoints of later steps, which the run could not read when it resumed, are renamed to `step-….damaged`.

    Args:
        folder: of the checkpoints.
        step: of the run.
        state: tensors, numbers, strings, and lists and dictionaries of them.
        keep: how many of the newest checkpoints to keep, including this one.
        keep_every: also keep every checkpoint whose step is a multiple of this; 0 for none.

    Returns:
        The path of the checkpoint.

    Raises:
        InputError: the disk is full; no old checkpoint has been deleted.
    """
    path = path_of(folder, step)
    contents = {"format": FORMAT, "step": step, **state}
    contents["digest"] = digest(*_parts(contents))
    write_atomically(path, lambda temporary: _write(contents, temporary))
    files = _files(folder)
    for of_step, later in files:
        if of_step > step:
            later.rename(later.with_suffix(".damaged"))
    for of_step, old in [file for file in files if file[0] < step][: 1 - keep or None]:
        if not keep_every or of_step % keep_every:
            old.unlink(missing_ok=True)
    return path


def path_of(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return folder / f"step-{step:08d}.pt"


def remove_leftovers(folder: Path) -> None:
    """Delete incomplete files of killed processes. Only the process that writes to the run may call this."""
    for leftover in folder.glob(".step-*.tmp"):
        leftover.unlink(missing_ok=True)


def _write(contents: dict[str, Any], path: Path) -> None:
    with open(path, "wb") as file:  # given a path, torch.save hides the reason of a failure
        torch.save(contents, file)


def size(state: dict[str, Any]) -> int:
    """Return the bytes of the tensors in `state`, which is about the size of its checkpoint."""
    return sum(part.nbytes for part in _parts(state) if isinstance(part, Tensor))


def check_room(folder: Path, state: dict[str, Any], count: int) -> None:
    """Raise InputError if the disk of `folder`, which may not exist yet, has no room for `count` checkpoints."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    needed, free = count * size(state), shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"{count} checkpoints take {needed / 1e9:.3g} GB, and the disk of {existing} has {free / 1e9:.3g} GB free: "
            "make room, or choose another --out"
        )


def _parts(value: Any, name: str = "") -> Iterator[Any]:
    """Yield names and values of all leaves of nested dictionaries and lists, in order."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _parts(item, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _parts(item, f"{name}/{index}")
    else:
        yield name
        yield value if isinstance(value, Tensor) else repr(value)


def latest(folder: Path) -> Path | None:
    """Return the path of the newest checkpoint in a folder, None if there is none."""
    files = _files(folder)
    return files[-1][1] if files else None


def latest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint in a folder, 0 if there is none."""
    files = _files(folder)
    return files[-1][0] if files else 0


def newest_of_run(out: Path) -> Path:
    """Return the path of the newest checkpoint of a run; raise InputError if there is none."""
    path = latest(out / "checkpoints")
    if path is None:
        raise InputError(f"{out} holds no checkpoint of a run: give the --out of a pretraining that has saved one")
    return path


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        path: of the file.
        device: of the returned tensors.

    Returns:
        The saved state, with `format` and `step`.

    Raises:
        InputError: the file is no checkpoint, is damaged, or was written by another version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and I/O errors of many types
        raise InputError(f"{path} is not a readable checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of this version of dspnet-fast (format {FORMAT})")
    if state.pop("digest", None) != digest(*_parts(state)):
        raise InputError(f"{path} is damaged: its contents do not match their digest")
    return _moved(state, device)


def load_newest(folder: Path, device: torch.device | str, report: Callable[[str], object]) -> dict[str, Any] | None:
    """Read the newest readable checkpoint of a folder.

    Args:
        folder: of the checkpoints.
        device: of the returned tensors.
        report: called with a message for each newer checkpoint that cannot be read.

    Returns:
        The saved state, None if there is no checkpoint.

    Raises:
        InputError: there are checkpoints, but none can be read.
    """
    files = _files(folder)
    problem: InputError | None = None
    for _, path in reversed(files):
        try:
            state = load(path, device)
        except InputError as error:
            problem = problem or error
            report(f"{error}; trying the one before")
        else:
            return state
    if problem is not None:
        raise InputError(
            f"none of the {len(files)} checkpoints in {folder} can be read: {problem}; put a copy of one back, "
            "or remove them all to start the run again"
        )
    return None


def load_of_run(out: Path, device: torch.device | str, report: Callable[[str], object]) -> dict[str, Any]:
    """As `load_newest` for a run directory; raise InputError if it has no checkpoint."""
    newest_of_run(out)
    state = load_newest(out / "checkpoints", device, report)
    assert state is not None
    return state


def _moved(value: Any, device: torch.device | str) -> Any:
    """Copy the tensors in nested dictionaries and lists to a device."""
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_moved(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value
