"""Plugins: modules outside this package that register providers (docs/providers.md)."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path

from .errors import InputError


def load(names: str) -> list[Path]:
    """Import plugins.

    Args:
        names: separated by commas: modules that Python finds, such as my_package.kernels, or paths of .py files.

    Returns:
        Their files.

    Raises:
        InputError: if a plugin does not exist or its import fails.
    """
    return [_load(name.strip()) for name in names.split(",") if name.strip()]


def _load(name: str) -> Path:
    try:
        if name.endswith(".py"):
            _load_file(Path(name).resolve())
            return Path(name).resolve()
        return Path(importlib.import_module(name).__file__ or "")
    except Exception as error:
        raise InputError(f"the plugin {name} cannot be imported: {type(error).__name__}: {error}") from error


@functools.cache
def _load_file(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(f"dspnet_plugin_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
