"""slim_batch_norm: reads x, writes y; its gradient reads x and dy and writes dx. The second read of each pass, for
moments and sums, is not counted because it can hit a cache."""

import pytest
import torch.nn.functional as F

from dspnet_fast.ops import slim_batch_norm

from .layers import DIRECTIONS, IMAGES, VIEWS, affine, halves, nbytes, random, runner, variants

EPS = 1e-5
CASES = {
    "projector.bn1 4096": (4096,),
    "1.1 72 24x24 w1.00": (72, 24, 24),
    "1.1 48 24x24 w0.50": (48, 24, 24),
    "5.1 960 3x3 w1.00": (960, 3, 3),
    "ResNet-18 64 24x24": (64, 24, 24),
}


def eager(first, second, weight, bias):
    return [F.batch_norm(view, None, None, weight, bias, True, 0.0, EPS) for view in (first, second)]


def ours(x, weight, bias):
    return slim_batch_norm(x, weight, bias, EPS, VIEWS)[0]


@pytest.mark.parametrize("variant", variants(slim_batch_norm))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES)
def test_slim_batch_norm(measure, case, direction, variant):
    x, dy = random(IMAGES, *CASES[case]), random(IMAGES, *CASES[case]).detach()
    norm = affine(x.shape[1])
    if variant in ("eager", "compile"):
        run = runner(variant, direction, eager, (*halves(x), *norm), dy.chunk(VIEWS))
    else:
        run = runner(variant, direction, ours, (x, *norm), (dy,))
    count = footprint = nbytes(x, dy)
    if direction != DIRECTIONS[0]:
        count, footprint = count + nbytes(x, dy, x), footprint + nbytes(dy, x)
    measure("slim_batch_norm", f"{case}, {direction}", variant, footprint, count, run)
