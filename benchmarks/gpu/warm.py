"""`python -m benchmarks.gpu.warm [PRECISION...]`: compile the Triton kernels of the timed steps before they are timed.

The launches are recorded for the networks, batches and images of run_all.sh (train/pretraining/ahead.py) and compiled
by several processes into Triton's cache, those of the first timed step first.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("DSPNET_BENCH_DEVICE", "cuda")

import torch

from dspnet_fast.ops import ahead, registry
from train.pretraining.ahead import step_launches
from train.run.device import configure_cuda

from . import measuring, records
from .step import Case, configuration

# Network, images, pixels. Most important first.
SIZES = [("mobilenet_v3_large", 1024, 128), ("mobilenet_v3_large", 64, 96), ("resnet", 512, 128)]
SECOND_SIZES = [("mobilenet_v3_large", 256, 224), ("resnet", 256, 224), ("resnet", 64, 96)]


def main() -> None:
    """Compile the kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("precisions", nargs="*", default=["bf16"], help="bf16, tf32, fp32 [bf16]")
    parser.add_argument("--second", action="store_true", help="also the sizes of the second call")
    parser.add_argument("--processes", type=int, help="number of processes [one per core]")
    options = parser.parse_args()
    began = time.monotonic()
    if not measuring.ON_GPU:
        print("no Triton kernels on a CPU")
        return
    registry.set_policy("any")
    launches: dict[Any, None] = {}
    for precision in options.precisions:
        configure_cuda(precision == "tf32", "deterministic")
        for size in SIZES + (SECOND_SIZES if options.second else []):
            config = configuration(Case(*size, precision))
            config.probe_epochs = 0.0  # steps have no probe
            launches |= dict.fromkeys(step_launches(config))
    results = ahead.compile_launches(list(launches), torch.cuda.get_device_capability(), print, options.processes)
    found: dict[str, Any] = {"kernels": len(results), "of": len(launches)}
    found["failed"] = [result for result in results if "error" in result]
    found["cpu_seconds"] = round(sum(result["seconds"] for result in results), 1)
    records.write("warm", **found, seconds=round(time.monotonic() - began, 1))


if __name__ == "__main__":
    main()
