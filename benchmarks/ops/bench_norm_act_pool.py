"""norm_act_pool: reads x; its gradient reads x and writes dx."""

import pytest
import torch.nn.functional as F

from benchmarks.eager import pool
from dspnet_fast.ops import norm_act_pool
from dspnet_fast.ops.norm_act_pool import pool_deferred

from .layers import ACTS, DIRECTIONS, IMAGES, VIEWS, affine, halves, nbytes, random, rows, runner, variants, weight

CASES = {
    "2.1 squeeze 120 12x12 w1.00": (120, 12, "relu"),
    "2.1 squeeze 72 12x12 w0.50": (72, 12, "relu"),
    "4.1 squeeze 672 6x6 w1.00": (672, 6, "hardswish"),
    "features 960 3x3 w1.00": (960, 3, "hardswish"),
    "features 480 3x3 w0.50": (480, 3, "hardswish"),
    "ResNet-18 512 3x3, plain": (512, 3, None),
}


def eager(act):
    def view(x, gamma, beta):
        if act is not None:
            x = ACTS[act](F.batch_norm(x, None, None, gamma, beta, True))
        return pool(x)

    return lambda first, second, *norm: (view(first, *norm), view(second, *norm))


def ours(act):
    return lambda x, scale, shift: pool_deferred(x, scale, shift, act or "identity")


@pytest.mark.parametrize("variant", variants(norm_act_pool))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES)
def test_norm_act_pool(measure, case, direction, variant):
    channels, size, act = CASES[case]
    x, dy = random(IMAGES, channels, size, size), weight(IMAGES, channels).detach()
    if variant in ("eager", "compile"):
        norm = affine(channels) if act else (None, None)
        function, inputs, grads = eager(act), (*halves(x), *norm), dy.to(x.dtype).chunk(VIEWS)
    else:
        function, inputs, grads = ours(act), (x, *(rows(channels) if act else (None, None))), (dy,)
    run = runner(variant, direction, function, inputs, grads)
    count = footprint = nbytes(x, dy)
    if direction != DIRECTIONS[0]:
        count, footprint = count + nbytes(dy, x, x), footprint + nbytes(dy, x)
    measure("norm_act_pool", f"{case}, {direction}", variant, footprint, count, run)
