"""scale_shift: reads and writes two rows per view; its gradient reads four and writes two. All data fit into a cache,
so the cost of the calls is measured. Moments are always fp32."""

import pytest

from dspnet_fast.ops import scale_shift

from .layers import DIRECTIONS, VIEWS, affine, nbytes, runner, variants, weight

EPS = 1e-5
CHANNELS = {"1.1 64 w1.00": (64, 64), "5.1 480 w0.50": (480, 960), "5.1 960 w1.00": (960, 960)}


def eager(mean, variance, weight, bias):
    """The eager alternative."""
    channels = mean.shape[1]
    scale = (variance + EPS).rsqrt() * weight[:channels]
    return scale, bias[:channels] - mean * scale


def ours(mean, variance, weight, bias):
    return scale_shift(mean, variance, weight, None, bias, None, EPS)


@pytest.mark.parametrize("variant", variants(scale_shift))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CHANNELS)
def test_scale_shift(measure, case, direction, variant):
    channels, full = CHANNELS[case]
    moments = [weight(VIEWS, channels).detach().square().requires_grad_() for _ in range(2)]
    arguments = *moments, *affine(full)
    gradients = [weight(VIEWS, channels).detach() for _ in range(2)]
    run = runner(variant, direction, eager if variant in ("eager", "compile") else ours, arguments, gradients)
    count = footprint = 2 * nbytes(*gradients)
    if direction != DIRECTIONS[0]:
        count, footprint = 5 * nbytes(*gradients), 4 * nbytes(*gradients)
    measure("scale_shift", f"{case}, {direction}", variant, footprint, count, run)
