"""Tests that lars_ema_step and adamw_ema_step share: exact targets, apply, threads, slices and builds."""

import sys

import pytest
import torch

from dspnet_fast.ops import cpp, flat_step
from tests.ops import test_adamw_ema_step, test_lars_ema_step
from tests.ops.flat_steps import DTYPES, LAYOUTS, check_apply, copy

RULES = {"adamw_ema_step": test_adamw_ema_step, "lars_ema_step": test_lars_ema_step}


@pytest.fixture(params=RULES)
def operator(request):
    return request.param


@pytest.fixture
def rules(operator):
    """The test module of the operator."""
    return RULES[operator]


@pytest.fixture(params=["native", "cpp"])
def provider(request, operator, policy):
    supported, reason = cpp.has(operator)
    if request.param == "cpp" and not supported:
        pytest.skip(reason)
    policy(request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tau_of_0_and_1_is_exact(provider, rules, dtype):
    arguments = rules.make("split between threads", dtype)
    kept = arguments["targets"].clone()
    rules.step(**arguments | {"tau": torch.tensor(1.0)})
    assert torch.equal(arguments["targets"], kept)
    rules.step(**arguments | {"tau": torch.tensor(0.0)})
    assert torch.equal(arguments["targets"], arguments["params"][: len(kept)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_step_without_apply_only_zeroes_the_gradients(provider, rules, layout):
    check_apply(rules.step, rules.make(layout, torch.float32), rules.BUFFERS)


def test_step_whose_apply_only_the_device_knows(operator, rules, policy, monkeypatch):
    """As on a GPU, where the host does not read `apply`."""
    policy("native")
    monkeypatch.setattr(sys.modules[f"dspnet_fast.ops.{operator}"], "read_on_cpu", lambda apply: (True, apply))
    check_apply(rules.step, rules.make("odd sizes", torch.float32), rules.BUFFERS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("least", [1, 800, 5000, 50_000])
def test_blocks_change_no_bit(rules, policy, monkeypatch, layout, least):
    policy("native")
    whole = rules.make(layout, torch.float32)
    in_blocks = copy(whole)
    rules.step(**whole)
    monkeypatch.setattr(flat_step, "BLOCK", least)
    rules.step(**in_blocks)
    assert all(torch.equal(whole[name], in_blocks[name]) for name in rules.BUFFERS)


def test_blocks_hold_every_element_once_and_whole_segments(monkeypatch):
    monkeypatch.setattr(flat_step, "BLOCK", 10)
    flats = torch.arange(40), torch.arange(25)
    views, segments = zip(*flat_step.blocks(flats, [2, 6, 9, 30]))
    for index, flat in enumerate(flats):
        assert torch.equal(torch.cat([part[index] for part in views]), flat)
    assert [len(part[0]) for part in views] == [30, 10] and segments == (slice(0, 3), slice(3, 4))
    assert [len(part[0]) for part, _ in flat_step.blocks(flats, [])] == [40]


@pytest.mark.parametrize("provider", ["cpp"], indirect=True)
def test_results_are_bitwise_equal_for_any_number_of_threads(provider, rules):
    arguments, results = rules.make("split between threads", torch.float32), []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        results.append(copy(arguments))
        rules.step(**results[-1])
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in rules.BUFFERS)


def test_unaligned_slices_of_one_buffer(provider, rules):
    """Vectors may be slices of one buffer, whose other elements are unchanged."""
    arguments = rules.make("odd sizes", torch.float32)
    memory, offset = torch.full((100_000,), 5.0), 3
    vectors = [name for name in rules.BUFFERS if arguments[name].ndim]
    for name in vectors:
        size = len(arguments[name])
        arguments[name] = memory[offset : offset + size].copy_(arguments[name])
        offset += size
    want = rules.expected("odd sizes", arguments)
    rules.step(**arguments)
    for name in vectors:
        torch.testing.assert_close(arguments[name].double(), want[name], rtol=1e-5, atol=1e-6)
    assert memory[:3].eq(5).all() and memory[offset:].eq(5).all()


BUILD = """
import torch
from dspnet_fast.ops import registry
from tests.ops.flat_steps import DTYPES, LAYOUTS
from tests.ops.test_OPERATOR import check, make
registry.set_policy("cpp")
torch.set_num_threads(3)
torch.manual_seed(0)
for dtype in DTYPES:
    for layout in LAYOUTS:
        for tau in (0.0, 0.3, 0.996, 1.0):
            check(layout, make(layout, dtype) | {"tau": torch.tensor(tau)})
print(torch.ops.dspnet_cpp.cpu_capability())
"""


def test_every_build_of_the_library(run_python, capability, operator):
    program = BUILD.replace("OPERATOR", operator)
    assert run_python("-c", program, ATEN_CPU_CAPABILITY=capability.lower()).strip() == capability
