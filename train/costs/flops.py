"""Multiply-accumulates (MACs) and parameters of networks and of pretraining runs, counted without running them.

In each step, the two views of B images pass through:

    target      encoder + projector of the full network, forward                                       2 B views
    online      encoder + projector + predictor of every sampled subnet, forward and backward           2 B views
    optimizer   LARS: 6 MACs for each online parameter, AdamW: 7; moving average: 2 for each target parameter

A backward pass counts as two forward passes: input gradient and weight gradient. This includes the gradient of the
images, which is not computed. The 6 MACs of LARS are: weight decay 1, norms 2, momentum 2, update 1. The 7 of AdamW:
weight decay 1, averages 3, denominator 2, update 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dspnet_fast import cost
from dspnet_fast.cost import mac_count, parameter_count
from dspnet_fast.models import MLP, build
from dspnet_fast.models import family as family_of
from dspnet_fast.slim import slim
from dspnet_fast.subnets import Family, Subnet

from ..config import FamilyOptions, PretrainConfig
from ..pretraining.dspnet import VIEWS

PASSES = 3  # a forward pass, and a backward pass that counts as two
OPTIMIZER_MACS, EMA_MACS = {"lars": 6, "adamw": 7}, 2  # per parameter


@dataclass(frozen=True)
class NetworkCost:
    """Cost of one network without classifier or heads.

    Attributes:
        parameters: number of parameters.
        macs: multiply-accumulates per image.
        features: channels of the representation.
    """

    parameters: int
    macs: int
    features: int


@dataclass(frozen=True)
class RunCost:
    """Multiply-accumulates of a whole run.

    Attributes:
        views: number of views that a network sees, two for each image and epoch.
        target: MACs of the target network.
        online: MACs by subnet.
        optimizer: MACs of the optimizer and of the moving average.
    """

    views: int
    target: float
    online: dict[str, float]
    optimizer: float

    def parts(self) -> dict[str, float]:
        """MACs of the target, of all online subnets together and of the optimizer."""
        return {"target": self.target, "online": sum(self.online.values()), "optimizer": self.optimizer}


def network_cost(options: FamilyOptions, subnet: Subnet, image_size: int) -> NetworkCost:
    """Cost of one subnet of a family.

    Args:
        options: network and stem.
        subnet: the subnet.
        image_size: height and width of an image, in pixels.
    """
    network = _on_meta(options, subnet)
    return NetworkCost(parameter_count(network), mac_count(network, image_size), subnet.channels[-1])


def largest_activation(config: PretrainConfig) -> int:
    """Number of elements of the full network's largest activation for one image."""
    return cost.largest_activation(_on_meta(config, family_of(config.network, config.names()).full), config.image_size)


def _on_meta(options: FamilyOptions, subnet: Subnet) -> nn.Module:
    """A network of torch.nn layers on the meta device."""
    with torch.device("meta"):
        return slim(build(options.network, subnet, options.stem, options.in_channels), None)


def network_costs(config: PretrainConfig) -> dict[str, NetworkCost]:
    """Costs of all subnets of a run by name, smallest first."""
    family = family_of(config.network, config.names())
    return {subnet.name: network_cost(config, subnet, config.image_size) for subnet in family}


def expected_steps(config: PretrainConfig, epoch_steps: int) -> dict[str, float]:
    """Number of steps that train each subnet; the expected number for randomly drawn subnets.

    Args:
        config: configuration of the run.
        epoch_steps: steps per epoch.
    """
    family: Family = family_of(config.network, config.names())
    steps = config.epochs * epoch_steps
    if len(family) == 1:
        return {family.full.name: float(steps)}
    later = max(0, steps - config.full_only_steps(epoch_steps))
    between = family.names[1:-1]
    drawn = min(len(between), config.subnets_per_step - 2)
    share = drawn / len(between) if between else 0.0
    middle = dict.fromkeys(between, later * share)
    return {family.smallest.name: float(later), **middle, family.full.name: float(steps)}


def run_cost(config: PretrainConfig, epoch_steps: int, costs: dict[str, NetworkCost]) -> RunCost:
    """Cost of a run.

    Args:
        config: configuration of the run.
        epoch_steps: steps per epoch.
        costs: result of `network_costs`.
    """
    hidden, out = config.hidden_features, config.out_features
    full = costs[family_of(config.network, config.names()).full.name]
    with torch.device("meta"):
        projector, predictor = (parameter_count(MLP(features, hidden, out)) for features in (full.features, out))
    steps = config.epochs * epoch_steps
    views = VIEWS * config.batch_size

    def projection_macs(network: NetworkCost) -> int:
        return network.macs + head_macs(network.features, hidden, out)

    online = {
        name: trained * views * PASSES * (projection_macs(costs[name]) + head_macs(out, hidden, out))
        for name, trained in expected_steps(config, epoch_steps).items()
    }
    target_parameters = full.parameters + projector
    optimizer = steps * (
        OPTIMIZER_MACS[config.optimizer] * (target_parameters + predictor) + EMA_MACS * target_parameters
    )
    return RunCost(views * steps, float(steps * views * projection_macs(full)), online, float(optimizer))


def head_macs(features: int, hidden: int, out: int) -> int:
    """Multiply-accumulates of projector or predictor for one view."""
    return features * hidden + hidden * out
