"""Training steps of families of any network in both formulations, beside MobileNetV3 written by hand.

A step trains the subnets w0.50 and w1.00 and runs the target, without the optimizer's update and with small heads, so
that the encoder takes most of the time. Steps of all networks and formulations alternate in one process with one
thread. Times are medians of processor time, so other processes on the machine matter less; `x eager` is how many times
as fast as the network's eager step a fused one is. The last line is machine-readable:

    traced_over_written=R

R is the time of a fused step of timm's MobileNetV3-Large, traced, over that of the same network written by hand.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import timm
import torch
from torch import nn

from dspnet_fast.machine import cpu_model
from dspnet_fast.models import family
from dspnet_fast.ops import registry
from train import cli
from train.pretraining.dspnet import VIEWS, DSPNet
from train.pretraining.flat_buffers import FlatBuffers

WRITTEN, TRACED = "mobilenet_v3_large", "benchmarks.networks:mobilenet_v3_large"
NETWORKS = (
    WRITTEN,
    TRACED,
    "timm:mobilenetv3_large_100",
    "timm:efficientnet_lite0",
    "timm:mobilenetv2_100",
    "timm:efficientnet_b0",
    "timm:resnet18",
    "timm:regnetx_002",
)
DNS = ("w0.50", "w1.00")
POLICIES = {"eager": "eager", "fused": "auto"}
WARM_UP = 2


def mobilenet_v3_large() -> nn.Module:
    """timm's MobileNetV3-Large as far as `dspnet_fast.models` has it: without the last convolution."""
    layers = timm.create_model("mobilenetv3_large_100", num_classes=0).as_sequential()
    end = next(index for index, layer in enumerate(layers) if "Pool" in type(layer).__name__)
    return nn.Sequential(*layers[: end + 1], nn.Flatten())


class Steps:
    """Training steps of a network in one formulation."""

    def __init__(self, network: str, policy: str, images: torch.Tensor, precision: str) -> None:
        registry.set_policy(policy)
        torch.manual_seed(0)
        self._policy, self._images = policy, images
        self._family = family(network, DNS)
        self._model = DSPNet(network, self._family, hidden_features=64, out_features=32, precision=precision)
        self._flat = FlatBuffers(self._model.online, self._model.target)

    def time(self) -> float:
        """Seconds of processor time of a step."""
        registry.set_policy(self._policy)
        self._flat.grads.zero_()
        began = time.process_time()
        self._model.accumulate(self._images, list(self._family), 0.5)
        return time.process_time() - began


def measure(
    networks: Sequence[str], images: int, size: int, rounds: int, precision: str
) -> dict[str, dict[str, float]]:
    """Median seconds of a step by network and formulation."""
    torch.set_num_threads(1)
    x = torch.randn(VIEWS * images, 3, size, size).contiguous(memory_format=torch.channels_last)
    steps = {(name, form): Steps(name, POLICIES[form], x, precision) for name in networks for form in POLICIES}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for number in range(WARM_UP + rounds):
        for key, step in steps.items():
            seconds = step.time()
            if number >= WARM_UP:
                times[key].append(seconds)
    return {name: {form: statistics.median(times[name, form]) for form in POLICIES} for name in networks}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table and the machine-readable line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.networks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default=",".join(NETWORKS), help="names as of --network, separated by commas")
    parser.add_argument("--images", type=int, default=16, help="images of a step, two views each")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of every network and formulation")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args(arguments)
    networks = options.networks.split(",")
    found = measure(networks, options.images, options.size, options.rounds, options.precision)
    print(f"{cpu_model()}, one thread, {options.images} images of {options.size} px, {options.precision}\n")
    print("| network | eager, ms | fused, ms | x eager |\n|---|---:|---:|---:|")
    for name, seconds in found.items():
        eager, fused = (1e3 * seconds[form] for form in POLICIES)
        print(f"| {name} | {eager:.0f} | {fused:.0f} | {eager / fused:.2f} |")
    if {WRITTEN, TRACED} <= found.keys():
        print(f"\ntraced_over_written={found[TRACED]['fused'] / found[WRITTEN]['fused']:.3f}")


if __name__ == "__main__":
    cli.run(main)
