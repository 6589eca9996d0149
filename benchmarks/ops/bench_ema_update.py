"""ema_update: reads target and online, writes target; 12 bytes per fp32 element."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.eager import ema
from dspnet_fast.ops import apex, ema_update

from .layers import ours
from .networks import CASES, networks

TAU = 0.996


APEX = ["apex"] if apex.supported()[0] else []
VARIANTS: dict[str, Callable[..., None]] = {
    "eager": ema,
    **dict.fromkeys([*APEX, *ours(ema_update)], ema_update),
}


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_ema_update(measure, case, variant):
    model = networks(case)
    targets = dict(model.target.named_parameters())
    onlines = dict(model.online.named_parameters())
    pairs = [parameter.data for parameter in targets.values()], [onlines[name].data for name in targets]
    elements = sum(target.numel() for target in pairs[0])
    measure("ema_update", case, variant, 8 * elements, 12 * elements, lambda: VARIANTS[variant](*pairs, TAU))
