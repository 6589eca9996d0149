"""slim_linear: the heads, whose first layer uses a prefix of its columns, and squeeze-and-excite; always in fp32.

The eager alternative has a copied prefix, as in benchmarks/eager.py."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.device import PRECISION
from benchmarks.eager import prefix
from dspnet_fast.ops import slim_linear

from .layers import DIRECTIONS, IMAGES, nbytes, runner, variants, weight

pytestmark = pytest.mark.skipif(PRECISION == "bf16", reason="a training step computes these layers in fp32")

# inputs, outputs, full weight, bias
CASES = {
    "projector.fc1 960>4096 w1.00": (960, 4096, (4096, 960), False),
    "projector.fc1 480>4096 w0.50": (480, 4096, (4096, 960), False),
    "projector.fc2 4096>256": (4096, 256, (256, 4096), True),
    "5.1 squeeze 960>240 w1.00": (960, 240, (240, 960, 1, 1), True),
    "5.1 squeeze 480>120 w0.50": (480, 120, (240, 960, 1, 1), True),
}


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
        used = prefix(full_weight, (outputs, inputs)).detach().flatten(1).contiguous().requires_grad_()
        function, arguments = F.linear, (x, used, bias)
    else:
        function, arguments = ours(outputs, torch.zeros_like(full_weight)), (x, full_weight, bias)
    run = runner(variant, direction, function, arguments, (dy,))
    size = 4 * inputs * outputs
    count = footprint = nbytes(x, dy) + size
    flops = 2 * IMAGES * inputs * outputs
    if direction != DIRECTIONS[0]:
        # dW is accumulated: read and written
        count, footprint, flops = count + nbytes(x, dy, x) + 3 * size, footprint + nbytes(x, dy) + size, 3 * flops
    measure("slim_linear", f"{case}, {direction}", variant, footprint, count, run, flops)
