"""Triton kernels without a GPU: the operators' tests with Triton's interpreter, and compilation for GPUs.

`make test-kernels` runs only these tests.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from dspnet_fast.ops.triton import SHARED_MEMORY

ROOT = Path(__file__).parent.parent.parent
OPERATORS = (
    "conv_moments",
    "conv_norm",
    "norm_act",
    "norm_act_pool",
    "scale_shift",
    "slim_batch_norm",
    "slim_conv2d",
    "slim_linear",
)
# Bytes of stack. ptxas may use a few to fit another block on a multiprocessor; spilling uses hundreds.
MAX_STACK = 16

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(
        importlib.util.find_spec("dspnet_fast.kernels") is None,
        reason="dspnet_fast.kernels is not installed: pip install -e . --no-build-isolation",
    ),
]


def test_strict_interpreter_detects_each_fault(run_python):
    messages = json.loads(run_python("tests/kernels/faulty.py", TRITON_INTERPRET="1"))
    expected = {
        "correct": "",
        "reads outside": "copy_kernel: program 2 reads outside the tensors",
        "writes outside": "copy_kernel: program 2 writes outside the tensors",
        "write conflict": "copy_kernel: programs 0 and 1 write to y, byte 60",
        "read conflict": "copy_kernel: program 1 reads x, byte 64, which program 0 writes",
        "writes twice": "write_twice_kernel: program 0 writes twice to y, byte 0",
        "reads back": "read_back_kernel: program 0 reads back y, byte 0",
        "overflows": "an offset overflows",
        "small product": "a product of (16, 4)",
    }
    assert messages.keys() == expected.keys()
    for name, message in expected.items():
        assert message in messages[name], name
    assert not messages["correct"]


INTERPRETED = [
    *((operator, "not slow") for operator in OPERATORS),
    # scale_shift has no slow tests that apply: its tensors are never fp16.
    *(pytest.param(operator, "slow", marks=pytest.mark.slow) for operator in OPERATORS if operator != "scale_shift"),
]


@pytest.mark.parametrize(("operator", "tests"), INTERPRETED)
def test_interpreted_kernels_pass_the_operator_tests(run_python, operator, tests):
    """Triton selects the interpreter at import, so the tests run in a subprocess."""
    printed = run_python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/ops/test_{operator}.py"),
        *("-k", "triton and not on_a_gpu and not threads", "-m", tests),
        TRITON_INTERPRET="1",
        OMP_NUM_THREADS="1",
    )
    assert " passed" in printed, printed


TRAINING_CASES = [
    ("mobilenet_v3_large", "bf16", 1),
    *(
        pytest.param(network, precision, 50, marks=pytest.mark.slow)
        for network in ("resnet", "mobilenet_v3_large")
        for precision in ("fp32", "bf16")
    ),
]


@pytest.mark.parametrize(("network", "precision", "steps"), TRAINING_CASES)
def test_training_with_interpreted_kernels_matches_native(run_python, network, precision, steps):
    printed = run_python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/train/test_final_weights.py"),
        *("-k", f"triton and {network} and {precision} and cpu"),
        TRITON_INTERPRET="1",
        OMP_NUM_THREADS="1",
        DSPNET_TEST_STEPS=str(steps),
    )
    assert "1 passed" in printed, printed


@pytest.fixture
def run_compiler(run_python, tmp_path):
    """run_compiler(*arguments): run Python with a compiling Triton, from the folder DSPNET_TRITON if it is set."""
    path = [folder for folder in (os.environ.get("DSPNET_TRITON"), str(ROOT)) if folder]
    environment = {"TRITON_INTERPRET": None, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(path)}
    return lambda *arguments: run_python(*arguments, **environment)


def test_recorded_launches_are_those_of_the_step(run_compiler):
    found = json.loads(run_compiler("tests/kernels/recorded_steps.py"))
    for name, (launched, missing) in found["missing"].items():
        assert launched > 100 and not missing, f"{name} launches kernels that were not recorded: {missing}"
    results, hits, lines = found["pool"]
    assert (results, hits) == (5, 4)
    assert lines[0] == "compiling 5 kernels, 2 processes" and lines[-2].startswith("compiled 4 of 5 kernels in ")
    assert lines[-1].startswith("not compiled: ") and "BLOCK" in lines[-1]


COMPILED = [name for name in OPERATORS if name != "slim_conv2d"]  # which calls conv_moments
SAMPLES = {"conv_moments": 7, "norm_act": 3}  # of these, every n-th launch unless all tests run


@pytest.mark.parametrize(
    ("operator", "architecture", "every"),
    [
        *((operator, 90, SAMPLES.get(operator, 1)) for operator in COMPILED),
        *(pytest.param(operator, 90, 1, marks=pytest.mark.slow) for operator in SAMPLES),
        *(pytest.param(operator, 80, 1, marks=pytest.mark.slow) for operator in COMPILED),
    ],
)
def test_kernels_compile_for_gpus_without_spills(run_compiler, operator, architecture, every):
    printed = run_compiler("tests/kernels/ahead_of_time.py", operator, str(architecture), str(every))
    lines = [json.loads(line) for line in printed.splitlines()]
    assert lines
    for line in lines:
        assert line["STACK"] <= MAX_STACK and line["LOCAL"] == 0, f"registers spill: {line}"
        assert line["REG"] <= 255 and line["shared"] <= SHARED_MEMORY, line
        if line.get("VECTORIZED"):
            # Weights, which products have in fp32 and slim_linear also in bf16, are read along their columns.
            activations = ["bf16"] if operator != "slim_linear" else []
            activations += ["f32"] if "pointwise" not in line["kernel"] else []
            loads = [load for dtype in activations for load in line[dtype]]
            assert all(width >= allowed for width, allowed in loads), f"a load is narrower than its tile allows: {line}"
            # A thread has two or four channels of a depthwise convolution: registers limit their number.
            assert all(width >= 4 for width, _ in loads), line
