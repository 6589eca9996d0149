"""`python -m benchmarks.gpu.verify`: verify all providers on calls of the timed step, in processes that may die.

One call of each class (calls.py) and calls of odd sizes are compared with the specification in higher precision, by the
error rule, with poisoned outputs, twice (dspnet_fast/verification).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict

if __name__ == "__main__":
    os.environ.setdefault("DSPNET_BENCH_DEVICE", "cuda")

from benchmarks.device import DEVICE
from dspnet_fast.verification.calls import Call
from dspnet_fast.verification.supervisor import verify
from train.run.device import configure_cuda

from . import records
from .calls import classes, step_calls
from .step import Case

IMAGES = 256  # the step has more: kernels depend on the size of images, not on their number
# Verified by a process each; all others share one.
CONVOLUTIONS = ("conv_moments", "conv_moments_backward", "conv_norm")


def groups(calls: Sequence[Call]) -> list[list[Call]]:
    """The calls of each process."""
    together: dict[str, list[Call]] = {}
    for call in calls:
        together.setdefault(call.operator if call.operator in CONVOLUTIONS else "other", []).append(call)
    return list(together.values())


def main() -> None:
    """Verify, and record the outcome of every operator and provider."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=55, help="time limit [%(default)s]")
    options = parser.parse_args()
    configure_cuda(False, "deterministic")
    calls = classes(step_calls(Case("mobilenet_v3_large", IMAGES, 128, "bf16")))
    print(f"{len(calls)} classes of calls", flush=True)
    failed = False
    with ThreadPoolExecutor() as pool:
        running = [
            pool.submit(verify, group, DEVICE, call_seconds=20, seconds=options.seconds, progress=print)
            for group in groups(calls)
        ]
        for done in as_completed(running):
            for operator, outcomes in done.result().items():
                for provider, outcome in outcomes.items():
                    records.write("verified", operator=operator, provider=provider, **asdict(outcome))
                    print(operator, provider, outcome.reason or f"verified, {outcome.calls} calls", flush=True)
                    failed |= not outcome.verified
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
