"""Triton kernels where there is no GPU: interpreted, by the tests of their operators; compiled for GPUs, for real.

`make test-kernels` runs these alone.
"""

import importlib.util
import json

import pytest

OPERATORS = (
    "conv_moments",
    "norm_act",
    "norm_act_pool",
    "scale_shift",
    "slim_batch_norm",
    "slim_conv2d",
    "slim_linear",
)
# Bytes of stack that ptxas takes by itself to fit one more block on a multiprocessor; spilling starts at hundreds.
NO_SPILL = 16
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}  # bytes that a block can have

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(
        importlib.util.find_spec("dspnet_fast.kernels") is None,
        reason="dspnet_fast.kernels is not there: pip install -e . --no-build-isolation",
    ),
]


@pytest.mark.parametrize("operator", OPERATORS)
def test_interpreted(run_python, operator):
    """Triton chooses the interpreter when it is imported, so this is a process of its own."""
    printed = run_python(
        *(
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"tests/ops/test_{operator}.py",
            "-k",
            "triton and not on_a_gpu and not threads",
        ),
        TRITON_INTERPRET="1",
        OMP_NUM_THREADS="1",
    )
    assert " passed" in printed, printed


@pytest.mark.parametrize(
    "operator", [name for name in OPERATORS if name != "slim_conv2d"]
)  # its kernels are conv_moments'
def test_compiles_for_gpus_without_spills(run_python, operator, tmp_path):
    printed = run_python(
        "tests/kernels/ahead_of_time.py", operator, TRITON_INTERPRET=None, TRITON_CACHE_DIR=str(tmp_path)
    )
    lines = [json.loads(line) for line in printed.splitlines()]
    assert {line["sm"] for line in lines} == {80, 90}
    for line in lines:
        assert line["STACK"] <= NO_SPILL and line["LOCAL"] == 0, f"registers spill: {line}"
        # A thread has two or four channels of a depthwise convolution; a warp has many, and reads them in one piece.
        wide = 8 if "depthwise" in line["kernel"] else 16
        assert line["widest"] >= wide or not line["constants"].get("WIDE"), f"no load is {wide} bytes wide: {line}"
        assert line["REG"] <= 255 and line["shared"] <= SHARED_MEMORY[line["sm"]], line
