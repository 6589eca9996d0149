"""Reading the configuration of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dspnet_fast.errors import InputError
from dspnet_fast.exported import MANIFEST

from ..config import FinetuneConfig, PretrainConfig, RunConfig
from .options import key

CONFIG = "config.yaml"
Config = TypeVar("Config", bound=RunConfig)


def read_config(out: Path, kind: type[Config]) -> Config:
    """Read the configuration of a run.

    Args:
        out: the run directory.
        kind: the class of the configuration.

    Raises:
        InputError: there is no run, or its configuration is of another version or kind.
    """
    return read_any_config(out, kind)


def read_any_config(out: Path, *kinds: type[Config]) -> Config:
    """As `read_config`, for a run of any of these kinds."""
    taken = " or ".join(kind.command for kind in kinds)
    if not (out / CONFIG).is_file():
        raise InputError(f"{out} holds no run: {_instead_of_run(out, taken)}")
    options = _read(out / CONFIG)
    found = next((kind for kind in kinds if options.keys() <= _names(kind).keys()), None)
    other = _kind_of(options)
    if found is None and other is not None:
        raise InputError(f"{out} is a run of {other.command}; this command needs one of {taken}")
    return _build(out / CONFIG, options, found or kinds[0])


def _instead_of_run(out: Path, taken: str) -> str:
    """What is at `out` in place of a run of the commands `taken`, and the remedy."""
    if not out.is_dir():
        return f"it is {'a file' if out.exists() else 'missing'}; give the --out of {taken}"
    if (out / MANIFEST).is_file():
        return f"it is an exported network; give the --out of {taken}"
    if (exported := min(out.glob(f"*/{MANIFEST}"), default=None)) is not None:
        return f"it has exported networks, such as {exported.parent.name}; give one of them, or the --out of {taken}"
    if next(out.glob("checkpoints/step-*.pt"), None) is not None:
        return f"it has checkpoints, but not their {CONFIG}; copy that file back"
    return f"there is no {CONFIG} in it; give the --out of {taken}"


def _read(path: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not a configuration of this version: {error}") from error
    if not isinstance(options, dict):
        raise InputError(f"{path} is not a configuration of this version: it holds no options")
    return options


def _build(path: Path, options: dict[str, Any], kind: type[Config]) -> Config:
    names = _names(kind)
    try:
        return kind(**{names.get(name, name): value for name, value in options.items()})
    except TypeError as error:
        raise InputError(f"{path} is not a configuration of this version: {error}") from error


def _names(kind: type[RunConfig]) -> dict[str, str]:
    """Field names by their names in YAML."""
    return {key(f.name): f.name for f in fields(kind)}


def _kind_of(options: dict[str, Any]) -> type[RunConfig] | None:
    """The class of configuration that has these options."""
    kinds: tuple[type[RunConfig], ...] = (PretrainConfig, FinetuneConfig)
    return next((kind for kind in kinds if options.keys() <= _names(kind).keys()), None)


def with_saved_config(argv: Sequence[str], kind: type[RunConfig]) -> list[str]:
    """With --resume, put the saved configuration of --out before the other arguments, which override it.

    Args:
        argv: the arguments.
        kind: the class of the configuration.

    Raises:
        InputError: as `read_config`, for the folder in --out.
    """
    arguments = list(argv)
    if "--resume" not in arguments:
        return arguments
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--out":
            out = value or "".join(arguments[index + 1 : index + 2])
            if out:
                read_config(Path(out), kind)
                return ["--config", str(Path(out) / CONFIG), *arguments]
    return arguments
