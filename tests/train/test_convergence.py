"""Kernels train alike: a hundred steps end where the native ones do, within what seeds differ by."""

import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks.convergence import GOLDEN, RECIPES, WINDOW, by_chance, distance, run
from dspnet_fast.ops import cpp

pytestmark = pytest.mark.skipif(
    not (Path(os.environ.get("DSPNET_DATA", "data")) / "cifar10").is_dir(), reason="needs DSPNET_DATA with cifar10"
)


FAST = [
    pytest.param("cpp", "cpu", marks=pytest.mark.skipif(not cpp.load()[0], reason=cpp.load()[1])),
    pytest.param("any", "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


@pytest.mark.parametrize(("policy", "device"), FAST)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_fast_kernels_train_as_native_ones_do(recipe, precision, policy, device):
    golden = json.loads(GOLDEN.read_text())
    assert (golden["recipes"], golden["window"]) == (RECIPES, WINDOW), "run python -m benchmarks.convergence --golden"
    seeds = golden["seeds"][recipe]
    allowed = by_chance(recipe, seeds)
    apart = distance([run(recipe, 0, policy, precision, device), seeds[0]])
    for measure in ("losses", "knn"):
        for name, difference in apart[measure].items():
            assert difference <= allowed[measure][name], (measure, name)
    for losses in seeds[0]["losses"].values():
        assert losses[-1] < 0.9 * losses[0]  # it did learn, or the comparison would say nothing
