"""normalized_mse: reads p and z; its gradient reads them and writes that of p."""

import pytest

from benchmarks.eager import regression
from dspnet_fast.ops import normalized_mse

from .layers import DIRECTIONS, nbytes, random, runner, variants

CASES = {"64 images": 64, "8192 images": 8192}
FEATURES = 256


@pytest.mark.parametrize("variant", variants(normalized_mse))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES)
def test_normalized_mse(measure, case, direction, variant):
    p, z = random(CASES[case], FEATURES), random(CASES[case], FEATURES).detach()
    function = regression if variant in ("eager", "compile") else normalized_mse
    run = runner(variant, direction, function, (p, z), (p.new_ones(()),))
    count = footprint = nbytes(p, z)
    if direction != DIRECTIONS[0]:
        count, footprint = count + nbytes(p, z, p), footprint + nbytes(p)
    measure("normalized_mse", f"{case}, {direction}", variant, footprint, count, run)
