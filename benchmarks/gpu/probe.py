"""`python -m benchmarks.gpu.probe`: print the GPU's name, as a folder name, and its compute capability.

With --limits: measure its limits instead, which results are compared with.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time

if __name__ == "__main__":
    os.environ.setdefault("DSPNET_BENCH_DEVICE", "cuda")

import torch

from benchmarks import machine
from benchmarks.device import gpu_times

from . import measuring, records


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


def ceilings() -> dict[str, float]:
    """Measured limits: a copy within DRAM and one within the L2 cache, in GB/s, and bf16 products, in TFLOP/s."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = statistics.median(gpu_times(lambda: left @ right, 0.2).seconds)
    return {
        "copy GB/s": machine.copy_bandwidth(machine.BEYOND_CACHES),
        "L2 GB/s": machine.copy_bandwidth(torch.cuda.get_device_properties().L2_cache_size // 2),
        "bf16 TFLOP/s": 2 * 8192**3 / seconds / 1e12,
    }


def main() -> None:
    """Print, and record the environment or the limits."""
    if measuring.ON_GPU and not torch.cuda.is_available():
        sys.exit("error: PyTorch finds no CUDA device; python -m benchmarks.step times the CPU")
    if sys.argv[1:] == ["--limits"]:
        if measuring.ON_GPU:
            records.write("ceilings", **ceilings())
        return
    if not measuring.ON_GPU:
        records.write("environment", GPU="none: a CPU stands in", date=time.strftime("%Y-%m-%d"))
        print("stand-in 90")
        return
    found = environment()
    records.write("environment", **found)
    major, minor = torch.cuda.get_device_capability()
    print(found["GPU"].lower().replace(" ", "-"), f"{major}{minor}")


if __name__ == "__main__":
    main()
