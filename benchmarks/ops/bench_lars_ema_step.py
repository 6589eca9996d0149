"""lars_ema_step: the norms read 8 bytes per fp32 element, the update reads and writes 32."""

import copy

import pytest
import torch

from train.arena import Arena

from .networks import CASES, networks

LR, TAU, WEIGHT_DECAY, MOMENTUM, ETA = 1e-3, 0.996, 1.5e-6, 0.9, 1e-3


def one_by_one(parameters, momenta, targets):
    """As published code has it: a Python loop over parameters for LARS, another for the target."""
    for name, parameter in parameters.items():
        gradient = parameter.grad
        if parameter.ndim > 1:
            gradient = gradient.add(parameter, alpha=WEIGHT_DECAY)
            weight_norm, gradient_norm = parameter.norm(), gradient.norm()
            ratio = torch.where((weight_norm > 0) & (gradient_norm > 0), ETA * weight_norm / gradient_norm, 1.0)
            gradient = gradient.mul(ratio)
        momenta[name].mul_(MOMENTUM).add_(gradient)
        parameter.sub_(momenta[name], alpha=LR)
    for name, target in targets.items():
        target.mul_(TAU).add_(parameters[name], alpha=1 - TAU)
    for parameter in parameters.values():
        parameter.grad.zero_()


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", ["loop", "native", "cpp"])
def test_lars_ema_step(moves, case, variant):
    model = copy.deepcopy(networks(case))
    arena = Arena(model.online, model.target)
    arena.grads.normal_()
    parameters, targets = dict(model.online.named_parameters()), dict(model.target.named_parameters())
    momenta = arena.momentum()
    footprint = 4 * (3 * len(arena.params) + len(arena.targets))
    count = 4 * (8 * len(arena.params) + 2 * len(arena.targets))

    def run():
        if variant == "loop":
            one_by_one(parameters, momenta, targets)
        else:
            arena.step(LR, TAU, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM, eta=ETA)

    moves("lars_ema_step", case, variant, footprint, count, run)
