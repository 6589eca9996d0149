"""benchmarks.gpu.traffic: the predicted memory traffic of the Triton kernels."""

import importlib.util

import pytest

from benchmarks.gpu.traffic import Layer, total

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

IMAGES = 16384
PIXELS = IMAGES * 8 * 8


@pytest.mark.parametrize(
    ("layer", "forward", "backward"),
    [
        (Layer("expand", 16, 64, 8), 16 + 64, 2 * 16 + 2 * 64),  # one kernel computes both gradients
        (Layer("expand", 112, 672, 8), 112 + 672, 3 * 112 + 4 * 672),
        (Layer("project", 672, 112, 8, gated=True), 672 + 112, 3 * 672 + 4 * 112),
        (Layer("depthwise", 672, 672, 8, 3, pooled=True), 2 * 672, 4 * 672),
    ],
    ids=["fused", "expand", "project", "depthwise"],
)
def test_each_activation_is_counted_once_per_launch(layer, forward, backward):
    for values, call in zip((forward, backward), layer.calls(IMAGES)):
        activations = 2 * PIXELS * values
        assert activations <= total(call).dram <= 1.12 * activations  # partial sums


def test_blocks_of_columns_are_counted_in_the_l2_cache():
    moved = total(Layer("project", 960, 160, 8).calls(IMAGES)[1])
    assert moved.l2 > 1.2 * moved.dram and moved.seconds("H200") < moved.seconds("A100")
