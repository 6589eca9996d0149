"""Verdicts: which providers were verified on a device, and which formulation of a step was faster there.

A verdict holds for one device with its software and settings (`key`) and for runs of one shape. Verdicts are kept as
files in the user's cache, $XDG_CACHE_HOME/dspnet-fast/verdicts or ~/.cache/dspnet-fast/verdicts.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import atomic, plugins, settings
from .errors import InputError
from .machine import TRITON, cpu_model, installed_version
from .ops import cpp, cuda
from .verification.supervisor import Outcome

POLICIES = {"eager": "eager", "fused": "auto"}  # by formulation
FORMULATIONS = tuple(POLICIES)
DRIVER = Path("/proc/driver/nvidia/version")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Race:
    """Times of whole steps of the formulations, measured in alternation.

    Attributes:
        images: images per step.
        seconds: median time of a step by formulation.
        control: median time of further eager steps, measured as those of another formulation.
        rounds: number of measurements of each.
    """

    images: int
    seconds: dict[str, float]
    control: float
    rounds: int

    @property
    def spread(self) -> float:
        """Relative difference between eager steps and eager steps."""
        return abs(self.control / self.seconds["eager"] - 1)


@dataclass(frozen=True)
class Verdict:
    """What was found on one device for runs of one shape.

    Attributes:
        date: day on which it was found.
        key: device, software and settings, see `key`.
        run: what the shapes of the run's calls and its steps depend on.
        operators: outcomes of verification by operator and provider.
        race: times of steps; None if there was no race.
        formulation: one of FORMULATIONS.
        reason: why this formulation.
    """

    date: str
    key: dict[str, Any]
    run: dict[str, Any]
    operators: dict[str, dict[str, Outcome]]
    race: Race | None
    formulation: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Verdict:
        """The inverse of `to_json`; ValueError if the values are of another version or damaged."""
        try:
            operators = {
                operator: {provider: Outcome(**outcome) for provider, outcome in outcomes.items()}
                for operator, outcomes in values["operators"].items()
            }
            race = None if values["race"] is None else Race(**values["race"])
            verdict = cls(**{**values, "operators": operators, "race": race})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"it is not a verdict of this version ({error})") from error
        if verdict.formulation not in FORMULATIONS:
            raise ValueError(f"unknown formulation {verdict.formulation!r}")
        return verdict


def findings(operators: dict[str, dict[str, Outcome]]) -> dict[tuple[str, str], str]:
    """The argument of `registry.use_findings`: for pairs of operator and provider the reason against it, or an empty
    string if it was verified.
    """
    return {
        (operator, provider): "" if outcome.verified else outcome.reason
        for operator, outcomes in operators.items()
        for provider, outcome in outcomes.items()
    }


def key(device: torch.device, plugin_names: str = "") -> dict[str, Any]:
    """What a verdict on this device depends on besides the run: hardware, software, settings, kernels.

    Args:
        device: the device.
        plugin_names: see `plugins.load`.
    """
    return {
        **(_gpu(device) if device.type == "cuda" else _cpu()),
        "torch": torch.__version__,
        **{n: value for n, value in settings.read().items() if device.type == "cuda" or not n.startswith("cudnn")},
        "kernels": _kernels(tuple(map(str, plugins.load(plugin_names)))),
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The entries in which two keys differ, in words."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(
        "other kernels" if name == "kernels" else f"{name} {new.get(name)} instead of {old.get(name)}" for name in names
    )


def _cpu() -> dict[str, Any]:
    return {"device": cpu_model(), "capability": torch.backends.cpu.get_cpu_capability()}


def _gpu(device: torch.device) -> dict[str, Any]:
    driver = re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text()) if DRIVER.exists() else None
    return {
        "device": torch.cuda.get_device_name(device),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "driver": driver[0] if driver else torch._C._cuda_getDriverVersion(),  # type: ignore[attr-defined]
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": installed_version(*TRITON) or "absent",
    }


@functools.cache
def _kernels(plugin_files: tuple[str, ...]) -> str:
    """A hash of everything that computes a step: layers, operators, Triton kernels, compiled libraries, plugins."""
    found = importlib.util.find_spec("dspnet_fast.kernels")
    folders = [cpp.PACKAGE / "ops", cpp.PACKAGE / "nn", *map(Path, (found and found.submodule_search_locations) or ())]
    files = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    hashed = hashlib.sha256()
    for path in (*files, cpp.LIBRARY, cuda.LIBRARY, *map(Path, plugin_files)):
        hashed.update(path.name.encode())
        hashed.update(path.read_bytes() if path.is_file() else b"")
    return hashed.hexdigest()


def folder() -> Path:
    """The folder of the cached verdicts."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "dspnet-fast" / "verdicts"


def path_of(key: dict[str, Any], run: dict[str, Any]) -> Path:
    """The file of a verdict."""
    text = json.dumps([key, run], sort_keys=True)
    return folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def read(key: dict[str, Any], run: dict[str, Any]) -> Verdict | None:
    """The cached verdict on a device for runs of a shape; None if there is none, with a warning if it is damaged."""
    try:
        return _read(path_of(key, run))
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, ValueError) as error:
        log.warning("a kept verdict is not used: %s", error)
        return None


def read_all() -> Iterator[Verdict]:
    """All cached verdicts that can be read, newest first."""
    with suppress(OSError, RuntimeError):  # no cache, or no home
        for path in sorted(folder().glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
            with suppress(OSError, ValueError):
                yield _read(path)


def _read(path: Path) -> Verdict:
    try:
        return Verdict.from_json(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def write(verdict: Verdict) -> Path | None:
    """Keep a verdict in the cache; returns its file, or None with a warning if the cache cannot be written."""
    try:
        path = path_of(verdict.key, verdict.run)
        atomic.write_text(path, json.dumps(verdict.to_json(), indent=1) + "\n")
        return path
    except (OSError, RuntimeError, InputError) as error:
        log.warning("the verdict is not kept for other runs: %s", error)
        return None
