"""The check of a provider on one call: every fault has its reason."""

import dataclasses
import re

import pytest
import torch

from dspnet_fast.ops import registry
from dspnet_fast.verification import worker
from dspnet_fast.verification.calls import Call, Layout
from dspnet_fast.verification.check import Reference, check, leaks
from dspnet_fast.verification.worker import Case

CPU = torch.device("cpu")
X = Layout((4, 8, 6, 6), (288, 1, 48, 8), 0, torch.float32)
CALL = Call("norm_act", (X, None, None, "identity", None, None, None, None))  # the output equals the input
native = registry.operators["norm_act"].native
kept = []


def unwritten(*args):
    output = native(*args)
    output[0, 0, 0] = torch.empty(6)
    return output


def depending_on_the_call(*args):
    kept.append(None)
    return native(*args) * (1 + 1e-7 * (len(kept) % 2))


FAULTS = {
    "": native,
    "an output shares memory with an argument": lambda *args: args[0],
    "an output is not channels-last": lambda *args: native(*args).contiguous(),
    r"output 0 is \[4, 8, 6, 6\] torch.float64, not \[4, 8, 6, 6\] torch.float32": lambda *args: native(*args).double(),
    r"output 0 is \[4, 8, 36\] torch.float32, not .*": lambda *args: native(*args).flatten(2),
    "output 0 is not finite, in 6 of 1152 elements": unwritten,
    "output 0 differs between two calls with the same arguments": depending_on_the_call,
    r"output 0 is off by .*": lambda *args: native(*args) + 1e-4,
}


@pytest.fixture(scope="module")
def reference():
    return Reference.of(CALL, CPU, seed=0)


def provider(run):
    return dataclasses.replace(registry.operators["norm_act"].providers["cpp"], run=run)


@pytest.mark.parametrize("reason", FAULTS)
def test_fault_has_its_reason(reference, reason):
    problem, _ = check(provider(FAULTS[reason]), reference)
    assert (problem == "") == (reason == "") and re.fullmatch(reason, problem)


def test_growing_memory_is_a_leak_and_steady_memory_is_none(reference):
    assert leaks(provider(native), reference) == ""
    assert "bytes of memory allocated" in leaks(provider(lambda *args: kept.append(native(*args))), reference)


def test_memory_that_grows_in_the_first_calls_only_is_no_leak(reference):
    calls = []

    def run(*args):
        calls.append(native(*args) if len(calls) < 20 else None)
        return native(*args)

    assert leaks(provider(run), reference) == "" and len(calls) > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_of_the_compiled_library_pass(dtype):
    made = registry.operators["norm_act_backward"].providers["cpp"]
    if not made.supported()[0]:
        pytest.skip(made.supported()[1])
    x = dataclasses.replace(X, dtype=dtype)
    rows = Layout((2, 8), (8, 1), 0, torch.float32)
    call = Call("norm_act_backward", (x, x, rows, rows, "hardswish", None, x, rows, rows, True))
    reference = Reference.of(call, CPU, seed=1)
    problem, share = check(made, reference)
    assert problem == "" and 0 < share <= 1 and leaks(made, reference) == ""


def test_error_beyond_its_bound_must_occur_with_every_draw():
    lines = []

    def run(wrong_draws):
        lines.clear()
        draws = iter([1.01] * wrong_draws + [1.0] * 100)
        faulty = {"cpp": provider(lambda *args: native(*args) * next(draws))}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(registry.operators["norm_act"], "providers", faulty)
            worker._check_all({0: Case(CALL, 0, "cpp")}, CPU, 1, lambda **line: lines.append(line))
        return lines[1]["problem"]

    assert run(wrong_draws=2) == "" and run(wrong_draws=3).startswith("output 0 is off by")
