"""What a pretraining run costs by count: images times multiply-accumulates, forward and backward.

Of a batch of B images every step shows 2 B views:

    target      2 B (encoder + projector)                                  forward, the full network, once
    online      2 B (encoder_s + projector_s + predictor) x 3              of every sampled subnet s
    optimizer   6 for each online parameter, 2 for each of the target's    whatever B is

A backward pass counts as two forward passes: the gradient of what goes in, and that of the weights. So that of the
images, which nobody computes, is counted too. LARS takes the weight decay, two norms, two products for the momentum and
one for the update; the target's average takes two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dspnet_fast.cost import parameter_count
from dspnet_fast.models import MLP
from dspnet_fast.models import family as family_of
from dspnet_fast.subnets import Family

from ..config import PretrainConfig
from ..pretraining.dspnet import VIEWS
from .flops import Cost, cost

PASSES = 3  # forward, and a backward of twice as much
LARS_MACS, AVERAGE_MACS = 6, 2


@dataclass(frozen=True)
class Counted:
    """Multiply-accumulates of a whole run.

    Attributes:
        views: images that a network sees in all, two views of each.
        target, optimizer: what they take.
        online: by subnet.
    """

    views: int
    target: float
    online: dict[str, float]
    optimizer: float

    def parts(self) -> dict[str, float]:
        """Target, online subnets together and optimizer."""
        return {"target": self.target, "online": sum(self.online.values()), "optimizer": self.optimizer}


def network_costs(config: PretrainConfig) -> dict[str, Cost]:
    """Of every subnet of a run, without heads."""
    family = family_of(config.network, config.names())
    return {subnet.name: cost(config, subnet, config.image_size) for subnet in family}


def sampled_steps(config: PretrainConfig, epoch_steps: int) -> dict[str, float]:
    """In how many steps of a run each subnet is trained; of those that are drawn at random, the expected number."""
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


def count(config: PretrainConfig, epoch_steps: int, costs: dict[str, Cost]) -> Counted:
    """The cost of a run; `costs` of its networks, as `network_costs` gives them."""
    hidden, out = config.hidden_features, config.out_features
    full = costs[family_of(config.network, config.names()).full.name]
    with torch.device("meta"):
        projector, predictor = (parameter_count(MLP(features, hidden, out)) for features in (full.features, out))
    steps = config.epochs * epoch_steps
    views = VIEWS * config.batch_size

    def projected(of: Cost) -> int:
        return of.macs + head_macs(of.features, hidden, out)

    online = {
        name: trained * views * PASSES * (projected(costs[name]) + head_macs(out, hidden, out))
        for name, trained in sampled_steps(config, epoch_steps).items()
    }
    followed = full.parameters + projector
    optimizer = steps * (LARS_MACS * (followed + predictor) + AVERAGE_MACS * followed)
    return Counted(views * steps, float(steps * views * projected(full)), online, float(optimizer))


def head_macs(features: int, hidden: int, out: int) -> int:
    """Multiply-accumulates of projector or predictor for one view."""
    return features * hidden + hidden * out
