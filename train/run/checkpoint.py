"""Checkpoints of a run: written atomically, with a digest of what is in them, read without unpickling anything but
tensors and plain values."""

from __future__ import annotations

import re
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
    """Write `state` (tensors, numbers, strings, lists and dictionaries of them), then drop old ones.

    keep: how many of the newest to keep, this one included. keep_every: and those of every so many steps; 0 for none.
    InputError if the disk is full; no old one has been dropped then. Those of later steps, which a run that went back
    behind them could not read, are set aside under another name.
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
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:08d}.pt"


def clear_rests(folder: Path) -> None:
    """Remove what processes left that were killed while they wrote; for the one that is going to write."""
    for rest in folder.glob(".step-*.tmp"):
        rest.unlink(missing_ok=True)


def _write(contents: dict[str, Any], path: Path) -> None:
    with open(path, "wb") as file:  # with a path in its place torch.save would not say why it fails
        torch.save(contents, file)


def size(state: dict[str, Any]) -> int:
    """Bytes of the tensors in `state`, to which a file of it adds little."""
    return sum(part.nbytes for part in _parts(state) if isinstance(part, Tensor))


def _parts(value: Any, name: str = "") -> Iterator[Any]:
    """Names and values of everything in nested dictionaries and lists, in the order in which they hold them."""
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
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and io errors of many types, all of them mean the same to the user
        raise InputError(f"{path} is not a readable checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of this version of dspnet-fast (format {FORMAT})")
    if state.pop("digest", None) != digest(*_parts(state)):
        raise InputError(f"{path} is damaged: what it holds is not what was written")
    return _moved(state, device)


def load_newest(folder: Path, device: torch.device | str, say: Callable[[str], object]) -> dict[str, Any] | None:
    """The newest checkpoint of a folder that can be read; None if it has none.

    `say` is told of newer ones that cannot. Raises InputError if there are checkpoints but none can be read.
    """
    files = _files(folder)
    problem: InputError | None = None
    for _, path in reversed(files):
        try:
            state = load(path, device)
        except InputError as error:
            problem = problem or error
            say(f"{error}; trying the one before")
        else:
            return state
    if problem is not None:
        raise InputError(
            f"none of the {len(files)} checkpoints in {folder} can be read: {problem}; put a copy of one back, "
            "or remove them all and the run begins anew"
        )
    return None


def load_of_run(out: Path, device: torch.device | str, say: Callable[[str], object]) -> dict[str, Any]:
    """As load_newest, of a run directory; InputError if it has none."""
    newest_of_run(out)
    state = load_newest(out / "checkpoints", device, say)
    assert state is not None
    return state


def _moved(value: Any, device: torch.device | str) -> Any:
    """Nested dictionaries and lists with their tensors on a device."""
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_moved(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value
