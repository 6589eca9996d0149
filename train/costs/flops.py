"""Multiply-accumulates (MACs) and parameters of networks and of pretraining runs, counted without running them.

In each step, the two views of B images pass through:

    target      encoder + projector of the full network, forward                                       2 B views
    online      encoder + projector + predictor of every sampled subnet, forward and backward           2 B views
    optimizer   LARS: 6 MACs for each online parameter, AdamW: 7; moving average: 2 for each target parameter
    teacher     a frozen network at its own image size, forward                                         2 B views

With a teacher, the online heads include the one that predicts its features, and with --local-weight the one that
predicts its feature map. With --self-weight 0, projector, predictor
and target's forward pass are left out. With --teacher-cache the teacher sees two views of every image once in the run.

A backward pass counts as two forward passes: input gradient and weight gradient. This includes the gradient of the
images, which is not computed. The 6 MACs of LARS are: weight decay 1, norms 2, momentum 2, update 1. The 7 of AdamW:
weight decay 1, averages 3, denominator 2, update 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from dspnet_fast import cost
from dspnet_fast.cost import mac_count, parameter_count
from dspnet_fast.errors import InputError
from dspnet_fast.models import MLP, TeacherHead, build
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
class TeacherCost:
    """Cost of a teacher.

    Attributes:
        macs: multiply-accumulates for one view.
        features: number of features.
        cached_views: views whose features are computed once for the whole run; None if every view is computed.
        map_channels: channels of its feature map; 0 if no subnet learns to predict it.
    """

    macs: int
    features: int
    cached_views: int | None = None
    map_channels: int = 0


@dataclass(frozen=True)
class RunCost:
    """Multiply-accumulates of a whole run.

    Attributes:
        views: number of views that a network sees, two for each image and epoch.
        target: MACs of the target network.
        online: MACs by subnet.
        optimizer: MACs of the optimizer and of the moving average.
        teacher: MACs of the teacher; 0 without one.
    """

    views: int
    target: float
    online: dict[str, float]
    optimizer: float
    teacher: float = 0.0

    def parts(self) -> dict[str, float]:
        """MACs of the target, of all online subnets together, of the optimizer and, if there is one, of the teacher."""
        teacher = {"teacher": self.teacher} if self.teacher else {}
        return {"target": self.target, "online": sum(self.online.values()), "optimizer": self.optimizer, **teacher}


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


def map_shape(config: PretrainConfig, subnet: Subnet | None = None) -> tuple[int, int, int]:
    """Channels, height and width of the feature map before pooling, of a subnet or the full network.

    Raises:
        InputError: the network has no such map.
    """
    network = _on_meta(config, subnet or family_of(config.network, config.names()).full).eval()
    images = torch.zeros(1, config.in_channels, config.image_size, config.image_size, device="meta")
    try:
        with torch.no_grad():
            _, channels, height, width = network.forward_dense(images)[1].shape  # type: ignore[operator]
    except InputError as error:
        raise InputError(f"--local-weight does not fit --network {config.network}: {error}") from error
    return channels, height, width


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


def run_cost(
    config: PretrainConfig, epoch_steps: int, costs: dict[str, NetworkCost], teacher: TeacherCost | None = None
) -> RunCost:
    """Cost of a run.

    Args:
        config: configuration of the run.
        epoch_steps: steps per epoch.
        costs: result of `network_costs`.
        teacher: cost of the run's teacher, if it has one.
    """
    hidden, out = config.hidden_features, config.out_features
    full = costs[family_of(config.network, config.names()).full.name]
    steps = config.epochs * epoch_steps
    views = VIEWS * config.batch_size
    regresses = teacher is None or config.self_weight > 0  # has projector, predictor and a target's forward pass
    taught, local = (0, 0) if teacher is None else (teacher.features, teacher.map_channels)

    with torch.device("meta"):
        projector, predictor = (parameter_count(MLP(features, hidden, out)) for features in (full.features, out))
        teacher_heads = parameter_count(TeacherHead(full.features, taught)) if taught else 0
        teacher_heads += parameter_count(TeacherHead(map_shape(config)[0], local)) if local else 0

    def online_macs(name: str) -> int:
        network = costs[name]
        macs = network.macs + network.features * taught
        if local:
            macs += math.prod(map_shape(config, family_of(config.network, [name]).full)) * local
        return macs + (head_macs(network.features, hidden, out) + head_macs(out, hidden, out) if regresses else 0)

    online = {
        name: trained * views * PASSES * online_macs(name)
        for name, trained in expected_steps(config, epoch_steps).items()
    }
    target = views * steps * (full.macs + head_macs(full.features, hidden, out)) if regresses else 0
    target_parameters = full.parameters + (projector if regresses else 0)
    parameters = target_parameters + (predictor if regresses else 0) + teacher_heads
    optimizer = steps * (OPTIMIZER_MACS[config.optimizer] * parameters + EMA_MACS * target_parameters)
    seen = views * steps if teacher is None or teacher.cached_views is None else teacher.cached_views
    return RunCost(
        views * steps, float(target), online, float(optimizer), float(seen * teacher.macs) if teacher else 0.0
    )


def head_macs(features: int, hidden: int, out: int) -> int:
    """Multiply-accumulates of projector or predictor for one view."""
    return features * hidden + hidden * out
