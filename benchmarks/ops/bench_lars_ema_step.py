"""lars_ema_step: the norms read 8 bytes per fp32 element, the update reads and writes 32.

If NVIDIA's apex is installed, its FusedSGD and multi-tensor EMA are timed too, although they compute no norms.
"""

import copy

import pytest
import torch

from benchmarks.eager import ema, lars
from dspnet_fast.ops import apex, lars_ema_step
from train.pretraining.flat_buffers import FlatBuffers

from .layers import ours
from .networks import CASES, networks

LR, TAU = 1e-3, 0.996
LARS = {"weight_decay": 1.5e-6, "momentum": 0.9, "eta": 1e-3}


def multi_tensor(parameters, momenta, targets):
    """LARS, the target's update and zeroing of gradients by PyTorch's multi-tensor functions."""
    gradients = [parameter.grad for parameter in parameters.values()]
    lars(list(parameters.values()), gradients, list(momenta.values()), LR, **LARS)
    ema(list(targets.values()), [parameters[name] for name in targets], TAU)
    torch._foreach_zero_(gradients)


def by_apex(parameters, targets):
    """SGD with momentum but without layer-wise adaptation, the target's update, and zeroing of gradients."""
    from apex.optimizers import FusedSGD

    sgd = FusedSGD(parameters.values(), LR, momentum=LARS["momentum"], weight_decay=LARS["weight_decay"])
    pairs = [target.data for target in targets.values()], [parameters[name].data for name in targets]

    def run():
        sgd.step()
        apex.ema_update(*pairs, TAU)
        sgd.zero_grad(set_to_none=False)

    return run


@torch.no_grad()
@pytest.mark.parametrize("variant", ["eager", *(["apex"] if apex.supported()[0] else []), *ours(lars_ema_step)])
@pytest.mark.parametrize("case", CASES)
def test_lars_ema_step(measure, case, variant):
    model = copy.deepcopy(networks(case))
    flat = FlatBuffers(model.online, model.target)
    flat.grads.normal_()
    parameters, targets = dict(model.online.named_parameters()), dict(model.target.named_parameters())
    momenta = flat.momentum()
    footprint = 4 * (3 * len(flat.params) + len(flat.targets))
    count = 4 * (8 * len(flat.params) + 2 * len(flat.targets))

    runs = {"eager": lambda: multi_tensor(parameters, momenta, targets)}
    if variant == "apex":
        runs["apex"] = by_apex(parameters, targets)
    run = runs.get(variant, lambda: flat.step(LR, TAU, **LARS))
    measure("lars_ema_step", case, variant, footprint, count, run)
