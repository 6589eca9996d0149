"""Convergence: 100 steps with fast kernels differ from native ones by no more than seeds differ."""

import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks.convergence import GOLDEN, SETTINGS, WINDOW, allowed_distance, distance, run
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
@pytest.mark.parametrize("setting", SETTINGS)
def test_fast_kernels_converge_like_native_ones(setting, precision, policy, device):
    golden = json.loads(GOLDEN.read_text())
    assert (golden["settings"], golden["window"]) == (SETTINGS, WINDOW), "run python -m benchmarks.convergence --golden"
    seeds = golden["seeds"][setting]
    allowed = allowed_distance(setting, seeds)
    apart = distance([run(setting, 0, policy, precision, device), seeds[0]])
    for measure in ("losses", "knn"):
        for name, difference in apart[measure].items():
            assert difference <= allowed[measure][name], (measure, name)
    for losses in seeds[0]["losses"].values():
        assert losses[-1] < 0.9 * losses[0]  # training reduced the loss: otherwise the comparison would be meaningless
