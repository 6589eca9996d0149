"""slim_linear: the heads, whose first layer uses a prefix of its columns, and squeeze-and-excite; always in fp32."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.device import PRECISION
from dspnet_fast.ops import slim_linear

from .layers import DIRECTIONS, IMAGES, VIEWS, halves, nbytes, runner, variants, weight

pytestmark = pytest.mark.skipif(PRECISION == "bf16", reason="a training step computes these layers in fp32")

# inputs, outputs, full weight, bias
CASES = {
    "projector.fc1 960>4096 w1.00": (960, 4096, (4096, 960), False),
    "projector.fc1 480>4096 w0.50": (480, 4096, (4096, 960), False),
    "projector.fc2 4096>256": (4096, 256, (256, 4096), True),
    "5.1 squeeze 960>240 w1.00": (960, 240, (240, 960, 1, 1), True),
    "5.1 squeeze 480>120 w0.50": (480, 120, (240, 960, 1, 1), True),
}


def eager(outputs, full):
    def view(x, weight, bias):
        if len(full) == 4:
            return F.conv2d(x[:, :, None, None], weight[:outputs, : x.shape[1]], bias)[:, :, 0, 0]
        return F.linear(x, weight[:outputs, : x.shape[1]], bias)

    return lambda first, second, *layer: (view(first, *layer), view(second, *layer))


def ours(outputs, main_grad):
    return lambda x, weight, bias: slim_linear(x, weight, bias, main_grad, outputs)


@pytest.mark.parametrize("variant", variants(slim_linear))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES)
def test_slim_linear(measure, case, direction, variant):
    inputs, outputs, full, has_bias = CASES[case]
    x, full_weight, dy = weight(IMAGES, inputs), weight(*full), weight(IMAGES, outputs).detach()
    bias = weight(outputs) if has_bias else None
    if variant in ("eager", "compile"):
        function, arguments, grads = eager(outputs, full), (*halves(x), full_weight, bias), dy.chunk(VIEWS)
    else:
        function, arguments, grads = ours(outputs, torch.zeros_like(full_weight)), (x, full_weight, bias), (dy,)
    run = runner(variant, direction, function, arguments, grads)
    prefix = 4 * inputs * outputs
    count = footprint = nbytes(x, dy) + prefix
    flops = 2 * IMAGES * inputs * outputs
    if direction != DIRECTIONS[0]:
        # dW is accumulated: read and written
        count, footprint, flops = count + nbytes(x, dy, x) + 3 * prefix, footprint + nbytes(x, dy) + prefix, 3 * flops
    measure("slim_linear", f"{case}, {direction}", variant, footprint, count, run, flops)
