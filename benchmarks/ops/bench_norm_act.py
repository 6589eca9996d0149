"""norm_act: reads x and the residual, writes their sum; its gradient reads dy, x and, for an activation or a scaled
residual, the residual, and writes dx and the residual's gradient unless that equals dy."""

import pytest
import torch.nn.functional as F

from dspnet_fast.ops import norm_act

from .layers import DIRECTIONS, IMAGES, VIEWS, affine, halves, nbytes, random, rows, runner, variants

# channels, size, activation, residual: "nothing", "plain", or "deferred" with a deferred normalisation
CASES = {
    "1.1 24 24x24 + residual w1.00": (24, 24, "identity", "plain"),
    "1.1 16 24x24 + residual w0.50": (16, 24, "identity", "plain"),
    "4.1 112 6x6 + residual w1.00": (112, 6, "identity", "plain"),
    "1.0 24 24x24 alone w1.00": (24, 24, "identity", "nothing"),
    "ResNet-18 64 24x24 + residual, relu": (64, 24, "relu", "plain"),
    "ResNet-18 128 12x12 + downsample, relu": (128, 12, "relu", "deferred"),
}


def eager(act, added):
    def norm(x, gamma, beta):
        return F.batch_norm(x, None, None, gamma, beta, True)

    def view(x, residual, gamma, beta, residual_gamma, residual_beta):
        x = norm(x, gamma, beta)
        if added != "nothing":
            x.add_(residual if added == "plain" else norm(residual, residual_gamma, residual_beta))
        return F.relu_(x) if act == "relu" else x

    def views(first, second, first_residual, second_residual, *norms):
        return view(first, first_residual, *norms), view(second, second_residual, *norms)

    return views


def ours(act):
    return lambda x, residual, scale, shift, *of_residual: norm_act(
        x, scale, shift, act, None, residual, *(of_residual or (None, None))
    )


@pytest.mark.parametrize("variant", variants(norm_act))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES)
def test_norm_act(measure, case, direction, variant):
    channels, size, act, added = CASES[case]
    x, dy = random(IMAGES, channels, size, size), random(IMAGES, channels, size, size).detach()
    residual = None if added == "nothing" else random(*x.shape)
    if variant in ("eager", "compile"):
        residuals = (None, None) if residual is None else halves(residual)
        function, grads = eager(act, added), dy.chunk(VIEWS)
        inputs = (
            *halves(x),
            *residuals,
            *affine(channels),
            *(affine(channels) if added == "deferred" else (None, None)),
        )
    else:
        function, grads = ours(act), (dy,)
        inputs = (x, residual, *rows(channels), *(rows(channels) if added == "deferred" else ()))
    run = runner(variant, direction, function, inputs, grads)
    count = nbytes(x, residual, dy)
    footprint = count
    if direction != DIRECTIONS[0]:
        passed_on = added != "deferred" and act == "identity"  # the residual's gradient is dy
        count += nbytes(dy, x, x) + (0 if passed_on else nbytes(residual, residual))
        footprint += nbytes(dy, x) + (0 if passed_on else nbytes(residual))
    measure("norm_act", f"{case}, {direction}", variant, footprint, count, run)
