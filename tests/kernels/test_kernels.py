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


def test_the_interpreter_is_strict(run_python):
    said = json.loads(run_python("tests/kernels/faulty.py", TRITON_INTERPRET="1"))
    wanted = {
        "right": "",
        "reads outside": "copy_kernel: program 2 reads outside the tensors",
        "writes outside": "copy_kernel: program 2 writes outside the tensors",
        "two write": "copy_kernel: programs 0 and 1 write to y, byte 60",
        "reads another's": "copy_kernel: program 1 reads x, byte 64, which program 0 writes",
        "writes twice": "fold_kernel: program 0 writes twice to y, byte 0",
        "reads back": "read_back_kernel: program 0 reads back y, byte 0",
        "overflows": "an offset overflows",
        "small product": "a product of (16, 4)",
    }
    assert said.keys() == wanted.keys()
    for name, message in wanted.items():
        assert message in said[name], name
    assert not said["right"]


INTERPRETED = [
    *((operator, "not slow") for operator in OPERATORS),
    # Statistics are never stored in fp16, and nothing else of theirs is slow.
    *(pytest.param(operator, "slow", marks=pytest.mark.slow) for operator in OPERATORS if operator != "scale_shift"),
]


@pytest.mark.parametrize(("operator", "tests"), INTERPRETED)
def test_interpreted(run_python, operator, tests):
    """Triton chooses the interpreter when it is imported, so this is a process of its own."""
    printed = run_python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/ops/test_{operator}.py"),
        *("-k", "triton and not on_a_gpu and not threads", "-m", tests),
        TRITON_INTERPRET="1",
        OMP_NUM_THREADS="1",
    )
    assert " passed" in printed, printed


TRAININGS = [
    ("mobilenet_v3_large", "bf16", 1),
    *(
        pytest.param(network, precision, 50, marks=pytest.mark.slow)
        for network in ("resnet", "mobilenet_v3_large")
        for precision in ("fp32", "bf16")
    ),
]


@pytest.mark.parametrize(("network", "precision", "steps"), TRAININGS)
def test_training_interpreted(run_python, network, precision, steps):
    printed = run_python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/train/test_final_weights.py"),
        *("-k", f"triton and {network} and {precision} and cpu"),
        TRITON_INTERPRET="1",
        OMP_NUM_THREADS="1",
        DSPNET_TEST_STEPS=str(steps),
    )
    assert "1 passed" in printed, printed


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "slim_conv2d"])  # has conv_moments' kernels
def test_compiles_for_gpus_without_spills(run_python, operator, architecture, tmp_path):
    printed = run_python(
        "tests/kernels/ahead_of_time.py",
        operator,
        str(architecture),
        TRITON_INTERPRET=None,
        TRITON_CACHE_DIR=str(tmp_path),
    )
    lines = [json.loads(line) for line in printed.splitlines()]
    assert lines
    for line in lines:
        assert line["STACK"] <= NO_SPILL and line["LOCAL"] == 0, f"registers spill: {line}"
        # A thread has two or four channels of a depthwise convolution; a warp has many, and reads them in one piece.
        wide = 8 if "depthwise" in line["kernel"] else 16
        assert line["widest"] >= wide or not line["constants"].get("VECTORIZED"), f"no load is {wide} bytes wide: {line}"
        assert line["REG"] <= 255 and line["shared"] <= SHARED_MEMORY[line["sm"]], line
