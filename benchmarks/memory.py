"""`python -m benchmarks.memory`: peak memory of a training step, a sandwich of n subnets against the full network.

Gradients are accumulated one subnet at a time, so activations of one network are alive at once (DSPNet section 4.1).
Each variant runs in a process of its own. On the CPU `allocated` is the highest sum of live tensors during a step, from
the profiler's record of every allocation, and `resident` the growth of the process; on CUDA both come from torch.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch

from train.config import PretrainConfig
from train.pretraining.trainer import Trainer

MIB = 2**20
WARMUP_STEPS = 2
MEASURED = "the step measured"


def peak_of_step(build: Callable[[], Callable[[], object]]) -> int:
    """The highest sum of live tensors, in bytes, during the third call of the step that `build` returns.

    Whatever `build` and the steps before allocated and kept counts, from the profiler's record of every allocation on
    the CPU, so nobody has to list what lives all the time.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step = build()
        for _ in range(WARMUP_STEPS):
            step()
        with torch.profiler.record_function(MEASURED):
            step()
    events = profile.profiler.kineto_results.events()
    began = next(event.start_ns() for event in events if event.name() == MEASURED)
    allocations = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for when, size in allocations:
        live += size
        if when >= began:
            peak = max(peak, live)
    return peak


def in_own_process(module: str, arguments: Sequence[str]) -> dict[str, float]:
    """What `python -m module arguments` prints, as JSON; RuntimeError with what it complained of."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"python -m {module} {' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Peak memory in MiB of one variant, in this process."""
    config = PretrainConfig(
        network="mobilenet_v3_large",
        dns=options.dns,
        image_size=options.image_size,
        batch_size=options.batch_size,
        subnets_per_step=options.subnets,
        full_only_epochs=0,
        epochs=1,
    )
    batch = torch.randint(256, (2 * options.batch_size, 3, options.image_size, options.image_size), dtype=torch.uint8)

    def build() -> Callable[[], object]:
        trainer = Trainer(config, epoch_steps=10, device=torch.device(options.device))
        return lambda: trainer.train_step(batch)

    if options.device == "cuda":
        step = build()
        for _ in range(WARMUP_STEPS):
            step()
        torch.cuda.reset_peak_memory_stats()
        step()
        stats = torch.cuda.memory_stats()
        peaks = (stats["allocated_bytes.all.peak"], stats["reserved_bytes.all.peak"])
        return {"allocated": peaks[0] / MIB, "resident": peaks[1] / MIB}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    step = build()
    for _ in range(WARMUP_STEPS):
        step()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    del step
    return {"allocated": peak_of_step(build) / MIB, "resident": resident}


def main() -> None:
    """Measure both variants and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dns", default="w0.50,w0.625,w0.75,w1.00")
    parser.add_argument("--subnets", type=int, default=4, help="subnets per step of the sandwich")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # measure in this process
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options)))
        return
    full = options.dns.split(",")[-1]
    variants = {f"full network alone, {full}": full, f"sandwich of {options.subnets} of {options.dns}": options.dns}
    results = []
    for name, dns in variants.items():
        results.append(in_own_process("benchmarks.memory", [*sys.argv[1:], "--one", "--dns", dns]))
        print(f"{name}: " + ", ".join(f"{kind} {value:.0f} MiB" for kind, value in results[-1].items()))
    alone, sandwich = results
    print(" ".join(f"{kind}_ratio={sandwich[kind] / alone[kind]:.3f}" for kind in alone))


if __name__ == "__main__":
    main()
