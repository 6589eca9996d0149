"""`python -m benchmarks.gpu.training`: do other kernels train alike on this GPU? Short runs on smooth synthetic images.

Some steps with other providers must end at the weights of the native bodies' run as nearly as rounding lets any two
runs, much as tests/train/test_final_weights.py has it: another native run, whose first weights are each off by a unit
in the last place, or one that stores activations in bf16 as well, says how near that is. Steps that are replayed as
CUDA graphs must have the bits of steps that are launched.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("DSPNET_BENCH_DEVICE", "cuda")

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.device import DEVICE, is_broken, settle
from dspnet_fast.ops import registry
from train.config import PretrainConfig
from train.trainer import Trainer

from . import records

FEW = 5  # steps, to compare bits
UNIT = torch.finfo(torch.float32).eps
POLICIES = ("any", "triton", "cuda")
ALLOWED = {"fp32": 3, "bf16": 1.5}  # times as far as the native run that is compared
# Rounding is amplified soon: on a CPU, MobileNetV3 in fp32 was 0.05 of the way apart after these few steps, after fifty
# steps half of the way.
STEPS = {"mobilenet_v3_large": 8, "resnet": 50}
NETWORKS: dict[str, dict[str, Any]] = {
    "mobilenet_v3_large": {"dns": "w0.50,w0.75,w1.00", "base_lr": 0.2},
    "resnet": {"dns": "c64-d2222,c96-d2222", "base_lr": 1.0},
}
SHORT: dict[str, Any] = {
    "stem": "small",
    "image_size": 32,
    "batch_size": 16,
    "hidden_features": 256,
    "out_features": 64,
    "subnets_per_step": 3,
    "warmup_epochs": 0,
    "full_only_epochs": 0,
    "epochs": 1,
}


@dataclass(frozen=True)
class Run:
    """The weights of the online network before and after, and the last losses."""

    before: Tensor
    after: Tensor
    losses: dict[str, float]

    def apart(self, other: Run) -> float:
        """How far the ends lie apart, as a share of the way that the other went."""
        return ((self.after - other.after).norm() / (other.after - other.before).norm()).item()


def batches(count: int, size: int, steps: int) -> list[Tensor]:
    """Two views of smooth images, mirrored and brightened, for every step: uint8 [2 count, 3, size, size]."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(steps):
        coarse = torch.rand(count, 3, 4, 4, generator=generator)
        images = F.interpolate(coarse, size=(size, size), mode="bilinear")
        light = 0.6 + 0.4 * torch.rand(2, count, 1, 1, 1, generator=generator)
        made.append((255 * torch.cat((light[0] * images, light[1] * images.flip(3)))).byte())
    return made


def train(network: str, policy: str, precision: str, steps: int = 0, nudged: bool = False, graphs: bool = True) -> Run:
    """A short run, of the network's STEPS unless told otherwise."""
    steps = steps or STEPS[network]
    options = {**SHORT, **NETWORKS[network]}
    config = PretrainConfig(network=network, precision=precision, no_cuda_graphs=not graphs, **options)
    registry.set_policy(policy)
    settle(ours=True)
    trainer = Trainer(config, steps, DEVICE)
    weights = trainer.arena.params
    if nudged:
        signs = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)).sign()
        weights.mul_(1 + UNIT * signs.to(DEVICE))
    before = weights.clone()
    for batch in batches(config.batch_size, config.image_size, steps):
        losses = trainer.train_step(batch.to(DEVICE))
    return Run(before, weights.clone(), {name: loss.item() for name, loss in losses.items()})


class Report:
    """What was found, kept and printed at once."""

    def __init__(self) -> None:
        self.sound = True

    def add(self, name: str, find: Callable[[], tuple[str, str, str]]) -> None:
        """find: gives what was found, what is allowed, and what is wrong with it, if anything."""
        began = time.monotonic()
        try:
            found, allowed, fault = find()
        except Exception as error:
            found, allowed, fault = "", "", f"{type(error).__name__}: {error}"[:300]
            traceback.print_exc()
        self.sound &= not fault
        print(f"{name}: {found} {allowed} {fault} ({time.monotonic() - began:.1f} s)", flush=True)
        records.write("training", name=name, found=found, allowed=allowed, fault=fault)
        if is_broken():
            sys.exit("the GPU is broken for this process: the rest is left out")


def same_bits(network: str, precision: str) -> tuple[str, str, str]:
    """Whether graphs compute what launches do."""
    launched, replayed = (train(network, "any", precision, FEW, graphs=graphs) for graphs in (False, True))
    different = (launched.after != replayed.after).sum().item()
    return f"{different} weights differ", "0", "other bits" if different else ""


def compare(report: Report, network: str, precision: str, native: Run) -> None:
    """Every policy's run with the native one in fp32."""
    near: list[float] = []

    def chance() -> tuple[str, str, str]:
        other = train(network, "native", precision, nudged=precision == "fp32")
        near.append(other.apart(native))
        return f"{near[0]:.2e} of the way apart: {_losses(other)}", "", ""

    report.add(f"{network}, native, {precision}{', off by a unit' if precision == 'fp32' else ''}", chance)
    for policy in POLICIES if near else ():

        def ends(policy: str = policy) -> tuple[str, str, str]:
            run = train(network, policy, precision)
            apart, allowed = run.apart(native), ALLOWED[precision] * near[0]
            fault = "" if apart <= allowed else "too far"
            return f"{apart:.2e} of the way apart: {_losses(run)}", f"{allowed:.2e}", fault

        report.add(f"{network}, {policy}, {precision}", ends)


def _losses(run: Run) -> str:
    return " ".join(f"{loss:.4f}" for loss in run.losses.values())


def main() -> None:
    """Train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with records.alone():
        sys.exit(not _all_networks())


def _all_networks() -> bool:
    report = Report()
    for network in NETWORKS:
        for precision in ALLOWED:
            report.add(f"{network}, {precision}: graphs against launches", partial(same_bits, network, precision))
        native: list[Run] = []

        def reference(network: str = network, native: list[Run] = native) -> tuple[str, str, str]:
            native.append(train(network, "native", "fp32"))
            return _losses(native[0]), "", ""

        report.add(f"{network}, native, fp32", reference)
        for precision in ALLOWED if native else ():
            compare(report, network, precision, native[0])
    return report.sound


if __name__ == "__main__":
    main()
