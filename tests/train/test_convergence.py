"""Kernels train alike: a hundred steps end where the native ones do, within what seeds differ by."""

import json
import os
from pathlib import Path

import pytest

from benchmarks.convergence import GOLDEN, RECIPE, WINDOW, distance, run, spread
from dspnet_fast.ops import cpp

pytestmark = pytest.mark.skipif(
    not (Path(os.environ.get("DSPNET_DATA", "data")) / "cifar10").is_dir(), reason="needs DSPNET_DATA with cifar10"
)


@pytest.mark.skipif(not cpp.load()[0], reason=cpp.load()[1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fast_kernels_stay_within_the_spread_of_three_seeds(precision):
    golden = json.loads(GOLDEN.read_text())
    assert (golden["recipe"], golden["window"]) == (RECIPE, WINDOW), "run python -m benchmarks.convergence --golden"
    by_chance = spread(golden["seeds"])
    apart = distance(run(0, "cpp", precision), golden["seeds"][0])
    for measure in ("losses", "knn"):
        for name, difference in apart[measure].items():
            assert difference <= by_chance[measure][name], (measure, name)
    first, last = (golden["seeds"][0]["losses"], -1)
    for losses in first.values():
        assert losses[last] < 0.8 * losses[0]  # it did learn, or the comparison would say nothing
