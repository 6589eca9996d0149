"""`python -m benchmarks.gpu.kernels [NAME...]`: launch the kernels that matter most, for ncu and compute-sanitizer.

The names are those of `calls.examined`; without names all are launched. Each call runs three times.
"""

from __future__ import annotations

import argparse
import os

if __name__ == "__main__":
    os.environ.setdefault("DSPNET_BENCH_DEVICE", "cuda")

import torch

from benchmarks.device import DEVICE
from dspnet_fast.ops import registry

from . import measuring
from .calls import examined, step_calls
from .step import SMALL, Case

CALLS = 3


def main() -> None:
    """Launch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="calls to run, for example 'expand forward' [all]")
    parser.add_argument("--small", action="store_true", help="small networks and images")
    options = parser.parse_args()
    calls = examined(step_calls(Case("mobilenet_v3_large", 1024, 128, "bf16"), options.small or SMALL))
    registry.set_policy("any")
    for name in options.names or calls:
        call = calls[name]
        print(f"{name}: {call.describe()}", flush=True)
        arguments = call.random(DEVICE, 0)
        for _ in range(CALLS):
            registry.operators[call.operator](*arguments)
    if measuring.ON_GPU:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
