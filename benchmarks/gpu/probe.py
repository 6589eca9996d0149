"""`python -m benchmarks.gpu.probe`: print the GPU's name, as a folder name, and its compute capability."""

from __future__ import annotations

import platform
import subprocess
import sys
import time

import torch

from . import records


def environment() -> dict[str, str]:
    """The GPU, and versions of driver and libraries."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        driver = []
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "GPU": torch.cuda.get_device_name(),
        "driver": driver[0] if driver else "unknown",
        "torch": torch.__version__,
        "cuDNN": str(torch.backends.cudnn.version()),
        "triton": "absent" if triton is None else triton.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Print, and record the environment."""
    if not torch.cuda.is_available():
        sys.exit("error: PyTorch finds no CUDA device; python -m benchmarks.step times the CPU")
    found = environment()
    records.write("environment", **found)
    major, minor = torch.cuda.get_device_capability()
    print(found["GPU"].lower().replace(" ", "-"), f"{major}{minor}")


if __name__ == "__main__":
    main()
