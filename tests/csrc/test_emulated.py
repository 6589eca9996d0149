"""The CUDA kernels, run on the CPU (emulator/emulator.h), pass the tests of their operators."""

import shutil

import pytest

for package in ("triton", "nvidia.cuda_cccl"):
    pytest.importorskip(package, reason="the emulator requires headers of Triton and of nvidia-cuda-cccl-cu12")

import emulated  # noqa: E402

compiler = shutil.which("g++")
pytestmark = pytest.mark.skipif(compiler is None, reason="no g++")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    emulated.build(str(compiler), folder)
    return folder


SETUP = """
import sys
import torch
from tests.csrc import emulated
emulated.load(sys.argv[1])
torch.manual_seed(0)
"""

EMA_UPDATE = """
from tests.ops.test_ema_update import DTYPES, SIZES, TAUS, check, pairs
sizes = [size for size in SIZES if size] + [0, 2048, 2049, 4096, 8192, 8193]
for dtype in DTYPES:
    for tau in TAUS:
        check(emulated.ema_update, dtype, tau, *pairs(dtype, sizes if tau == 0.996 else SIZES[:4]))
    # All misalignments: vector loads are possible only if target and online are misaligned by the same offset.
    for shift in range(9):
        target, online = torch.full((1200,), 5.0).to(dtype), torch.randn(1200).to(dtype)
        inside = target[shift : shift + 1000].normal_()
        for offset in (shift, 3):
            check(emulated.ema_update, dtype, 0.9, [inside], [online[offset : offset + 1000]])
        assert target[:shift].eq(5).all() and target[shift + 1000 :].eq(5).all()
    # Just below, at and above 120, the number of pairs per launch.
    for count in (119, 120, 121, 301):
        check(emulated.ema_update, dtype, 0.3, *pairs(dtype, [i % 11 for i in range(count)]))
t = torch.randn(50)
kept = t.clone()
emulated.ema_update([t], [t], 0.3)
torch.testing.assert_close(t, kept)
for tau, expected in ((1.0, 0.0), (0.0, 1.0)):
    t = torch.zeros(1000)
    emulated.ema_update([t], [torch.ones(1000)], tau)
    assert t.eq(expected).all()
"""

FLAT_STEP = """
import functools
from tests.ops.flat_steps import LAYOUTS, check_apply
LAYOUTS["ends of tiles"] = ([(4096, True), (4095, False), (4097, True), (1, True), (8192, False), (3, True)], 16385)
# More than the 220 regions per launch, of 1 to 6 elements, some of them adjacent segments.
LAYOUTS["many"] = ([(i % 6 + 1, i % 7 > 0) for i in range(700)], 1500)
LAYOUTS["one full launch"] = ([(i % 6 + 1, i % 2 == 0) for i in range(220)], 700)
LAYOUTS["one region more than a launch"] = ([(i % 6 + 1, i % 2 == 0) for i in range(221)], 700)
for dtype in rules.DTYPES:
    for layout in LAYOUTS:
        for tau in (0.0, 0.3, 0.996, 1.0) if layout == "odd sizes" else (0.996,):
            rules.check(layout, rules.make(layout, dtype) | {"tau": torch.tensor(tau)}, step)
        check_apply(functools.partial(step, **rules.OPTIONS), rules.make(layout, dtype), rules.BUFFERS)
# Scalars may have any floating-point dtype.
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    values = {"lr": 0.375, "tau": 0.75, "weight_decay": 0.25, "steps": 5.0}
    arguments = rules.make("odd sizes", torch.float32)
    scalars = {name: torch.tensor(value, dtype=dtype) for name, value in values.items() if name in arguments}
    rules.check("odd sizes", arguments | scalars, step)
# All misalignments, the same for all buffers and different ones.
vectors = [name for name in rules.BUFFERS if rules.make("odd sizes", torch.float32)[name].ndim]
for dtype in rules.DTYPES:
    for shift in range(5):
        for others in ({}, {"targets": 1}, {vectors[-2]: 2}):
            offsets = {name: others.get(name, shift) for name in vectors}
            arguments = rules.make("odd sizes", dtype)
            memory = {name: torch.full((10_200,), 5.0, dtype=dtype) for name in vectors}
            for name, offset in offsets.items():
                arguments[name] = memory[name][offset : offset + len(arguments[name])].copy_(arguments[name])
            expected = rules.expected("odd sizes", arguments)
            step(**arguments, **rules.OPTIONS)
            for name, offset in offsets.items():
                torch.testing.assert_close(arguments[name].double(), expected[name], rtol=1e-5, atol=1e-6)
                assert memory[name][:offset].eq(5).all()
                assert memory[name][offset + len(arguments[name]) :].eq(5).all()
"""

ADAMW_EMA_STEP = (
    """
from tests.ops import test_adamw_ema_step as rules
step = emulated.adamw_ema_step
"""
    + FLAT_STEP
    + """
for done in (0, 1000, 10**6):
    for dtype in rules.DTYPES:
        rules.check("odd sizes", rules.make("odd sizes", dtype, done=done), step)
rules.OPTIONS |= {"beta1": 0.0, "beta2": 0.999999}
rules.check("odd sizes", rules.make("odd sizes", torch.float64, done=0), step)
for poison in (float("nan"), float("inf")):
    arguments = rules.make("odd sizes", torch.float32)
    clean = rules.copy(arguments)
    step(**clean, **rules.OPTIONS)
    arguments["grads"][1000] = poison
    step(**arguments, **rules.OPTIONS)
    for name in ("params", "momenta", "variances", "targets"):
        assert not arguments[name][1000].isfinite()
        arguments[name][1000] = clean[name][1000]
    assert all(torch.equal(arguments[name], clean[name]) for name in rules.BUFFERS)
"""
)

LARS_EMA_STEP = (
    """
from tests.ops import test_lars_ema_step as rules
step = emulated.lars_ema_step
"""
    + FLAT_STEP
    + """
# Norms that are 0, tiny, infinite or NaN.
for name in ("params", "grads"):
    for decay in (0.0, 0.03):
        arguments = rules.make("odd sizes", torch.float32)
        arguments[name][7 : 7 + 769] = 0
        rules.check("odd sizes", arguments, step, weight_decay=decay)
arguments = rules.make("only adapted", torch.float32)
arguments["grads"] *= 1e-24
arguments["momenta"].zero_()
step(**arguments, weight_decay=0.0, momentum=0.0, eta=0.02)
assert arguments["momenta"].double().norm() > 0.1
for poison in (float("nan"), float("inf")):
    arguments = rules.make("odd sizes", torch.float32)
    clean = rules.copy(arguments)
    step(**clean, **rules.OPTIONS)
    arguments["grads"][1000] = poison
    step(**arguments, **rules.OPTIONS)
    segment = slice(781, 781 + 5125)
    for name in ("params", "momenta", "targets"):
        assert arguments[name][1000].isnan()
        arguments[name][segment] = clean[name][segment]
    assert all(torch.equal(arguments[name], clean[name]) for name in rules.BUFFERS)
# Without weight decay, a NaN weight does not change its momentum or any other element.
arguments = rules.make("none adapted", torch.float32)
arguments["params"][5] = float("nan")
step(**arguments, **rules.OPTIONS)
assert arguments["momenta"].isfinite().all() and arguments["params"].isfinite().sum() == 99
"""
)

NORMALIZED_MSE = """
from dspnet_fast.ops.normalized_mse import EPS
from tests.ops.test_normalized_mse import DTYPES, SHAPES, check, inputs
forward, backward = emulated.normalized_mse, emulated.normalized_mse_backward
for dtype in DTYPES:
    for shape in (*SHAPES[:4], (17, 256), (8, 64), (1, 32), (9, 8)):
        check(*inputs(shape, dtype), forward, backward)
    for shift in (1, 2, 4):  # misaligned rows
        p, z = (torch.randn(9 * 64 + shift).to(dtype)[shift:].view(9, 64) for _ in range(2))
        check(p, z, forward, backward)
check(*inputs((8300, 4), torch.float32), forward, backward)  # more rows than blocks: several per block
p, z = inputs((7, 40), torch.float32, requires_grad=False)
one = torch.tensor(1.0)
dp, dz = backward(one, p, z, True, True)
assert torch.equal(backward(one, p, z, True, False)[0], dp) and torch.equal(backward(one, p, z, False, True)[1], dz)
assert forward(torch.zeros(2, 5), torch.randn(2, 5)) == 2 and forward(torch.empty(3, 0), torch.empty(3, 0)) == 2
assert backward(one, torch.zeros(2, 5), torch.randn(2, 5), True, True)[0].isfinite().all()
unit = torch.nn.functional.normalize
short = EPS / 10 * unit(torch.randn(7, 40))  # lengths below EPS are replaced by EPS
torch.testing.assert_close(forward(short, z), (2 - 2 * (short / EPS * unit(z)).sum(1)).mean())
torch.testing.assert_close(backward(one, short, z, True, False)[0], -2 / 7 / EPS * unit(z))
torch.testing.assert_close(backward(one, z, short, False, True)[1], -2 / 7 / EPS * unit(z))
p[2, 7] = float("nan")
assert forward(p, z).isnan()
for gradient in backward(one, p, z, True, True):
    assert gradient[2].isnan().any() and gradient[[0, 1, 3, 4, 5, 6]].isfinite().all()
"""


TRAINING = """
from dspnet_fast.ops import lars_ema_step, normalized_mse, registry
from dspnet_fast.ops.normalized_mse import normalized_mse_backward
from tests.train import test_final_weights as training
calls = []
def serve(operator, kernel):
    @operator.provider("cuda", devices=("cpu",))
    def _(*arguments):
        calls.append(operator.name)
        return kernel(*arguments)
def backward(grad, p, z, *wanted):
    gradients = emulated.normalized_mse_backward(grad, p.contiguous(), z.contiguous(), *wanted)
    return tuple(p.new_empty(0) if gradient is None else gradient for gradient in gradients)
serve(lars_ema_step, emulated.lars_ema_step)
serve(normalized_mse, lambda p, z: emulated.normalized_mse(p.contiguous(), z.contiguous()))
serve(normalized_mse_backward, backward)
for unused in ("adamw_ema_step", "ema_update"):  # not called in a training step
    del registry.operators[unused].providers["cuda"]
training.check_fp32("mobilenet_v3_large", "cuda")
counts = {name: calls.count(name) for name in set(calls)}
steps = training.STEPS
assert counts == {"lars_ema_step": steps, "normalized_mse": 2 * steps, "normalized_mse_backward": 2 * steps}, counts
"""


@pytest.mark.parametrize(
    "cases",
    [ADAMW_EMA_STEP, EMA_UPDATE, LARS_EMA_STEP, NORMALIZED_MSE],
    ids=["adamw_ema_step", "ema_update", "lars_ema_step", "normalized_mse"],
)
def test_emulated_kernels_satisfy_the_rules(kernels, run_python, cases):
    run_python("-c", SETUP + cases, str(kernels))


@pytest.mark.parametrize("steps", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_training_with_emulated_kernels_matches_native(kernels, run_python, steps):
    run_python("-c", SETUP + TRAINING, str(kernels), DSPNET_TEST_STEPS=str(steps))
