"""adamw_ema_step: one pass reads and writes 40 bytes per fp32 element, 32 without a target."""

import copy

import pytest
import torch

from benchmarks.eager import ema
from dspnet_fast.ops import adamw_ema_step
from train.pretraining.flat_buffers import FlatBuffers

from .layers import ours
from .networks import CASES, networks

LR, TAU, DECAY = 1e-3, 0.996, 0.05


def multi_tensor(parameters, targets):
    """torch.optim.AdamW, the target's update and zeroing of gradients by PyTorch's multi-tensor functions."""
    optimizer = torch.optim.AdamW(parameters.values(), LR, weight_decay=DECAY, foreach=True)
    gradients = [parameter.grad for parameter in parameters.values()]

    def run():
        optimizer.step()
        ema(list(targets.values()), [parameters[name] for name in targets], TAU)
        torch._foreach_zero_(gradients)

    return run


@torch.no_grad()
@pytest.mark.parametrize("variant", ["eager", *ours(adamw_ema_step)])
@pytest.mark.parametrize("case", CASES)
def test_adamw_ema_step(measure, case, variant):
    model = copy.deepcopy(networks(case))
    flat = FlatBuffers(model.online, model.target, "adamw")
    flat.grads.normal_()
    flat.schedule(LR, TAU, DECAY)
    parameters, targets = dict(model.online.named_parameters()), dict(model.target.named_parameters())
    footprint = 4 * (4 * len(flat.params) + len(flat.targets))
    count = 4 * (8 * len(flat.params) + 2 * len(flat.targets))
    if variant == "eager":
        run = multi_tensor(parameters, targets)
    else:
        run = lambda: flat.update_adamw(beta1=0.9, beta2=0.999)  # noqa: E731
    measure("adamw_ema_step", case, variant, footprint, count, run)
