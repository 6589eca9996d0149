"""The machine's processor, what its devices can compute with, and the versions of what is installed."""

import importlib.metadata
import platform
from pathlib import Path

import torch
from torch import Tensor

TRITON = ("triton", "pytorch-triton", "triton-windows")  # distributions of Triton
WITHOUT_FLOAT64 = ("mps", "meta")  # meta, so that the tests can tell without an Apple GPU


def scalar_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that have no float64."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def in_float64(x: Tensor) -> Tensor:
    """A tensor in float64; on the CPU if its device has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def cpu_model() -> str:
    """The processor's model name. On aarch64, for which Linux has no name, the numbers of its implementer and part."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    facts: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    if "CPU part" in facts:
        return f"aarch64, implementer {facts['CPU implementer']}, part {facts['CPU part']}"
    return facts.get("model name") or platform.processor() or "unknown"


def installed_version(*distributions: str) -> str:
    """The version of the first of these distributions that is installed, or an empty string. Imports nothing."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""
