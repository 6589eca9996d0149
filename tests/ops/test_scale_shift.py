"""scale_shift: its formulas by autograd in float64, every provider by the error rule, rejected arguments."""

import harness
import pytest
import torch
from harness import check_build, differentiable, double, provider_of, run, to_device
from torch.library import opcheck

from dspnet_fast.errors import InputError
from dspnet_fast.ops import cpp, registry, scale_shift
from dspnet_fast.ops.scale_shift import scale_shift_backward

# (views, channels, elements of weight and bias)
CASES = {
    "whole": (2, 16, 16),
    "slice": (2, 13, 40),
    "one view": (1, 200, 201),
    "three views": (3, 300, 1000),
    "one channel": (2, 1, 3),
}
AFFINE = [(True, True), (True, False), (False, True), (False, False)]
OUTPUTS = "scale", "shift"

needs_cpp = pytest.mark.skipif(not cpp.has("scale_shift")[0], reason=cpp.has("scale_shift")[1])


provider = provider_of(scale_shift)


def make(case: str, weight: bool = True, bias: bool = True) -> dict:
    """The operator's arguments."""
    views, channels, full = CASES[case]
    return {
        "mean": 3 * torch.randn(views, channels),
        "variance": torch.rand(views, channels) ** 2,
        "weight": 1 + torch.rand(full) if weight else None,
        "weight_main_grad": None,
        "bias": torch.randn(full) if bias else None,
        "bias_main_grad": None,
        "eps": 1e-5,
    }


def composed(mean, variance, weight, weight_main_grad, bias, bias_main_grad, eps):
    """Scale and shift from the batch normalisation of 0 and 1."""
    channels = mean.shape[1]
    gamma = torch.ones_like(mean) if weight is None else weight[:channels]
    beta = torch.zeros_like(mean) if bias is None else bias[:channels]
    zero, one = ((x - mean) / (variance + eps).sqrt() * gamma + beta for x in (0, 1))
    return one - zero, zero


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weight, bias", AFFINE)
def test_native_body_equals_the_formulas(case, weight, bias):
    arguments = double(make(case, weight, bias))
    got, cotangents, grads = run(scale_shift, arguments)
    want, _, want_grads = run(composed, arguments, cotangents)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)  # cancellation
    torch.testing.assert_close(grads, want_grads, rtol=1e-9, atol=1e-6)


def check(arguments: dict) -> None:
    """Check the active provider by the error rule."""
    harness.check(scale_shift, OUTPUTS, arguments)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weight, bias", AFFINE)
def test_provider_satisfies_the_error_rule(provider, nan_filled, case, weight, bias):
    check(make(case, weight, bias))


def test_error_rule_for_strided_vectors(policy, nan_filled):
    policy("auto")
    arguments = make("slice")
    for name in ("mean", "variance"):
        arguments[name] = arguments[name].t().contiguous().t()
    for name in ("weight", "bias"):
        arguments[name] = arguments[name].repeat_interleave(2)[::2]
    check(arguments)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_added_to_the_prefixes_of_main_grads(provider, case):
    arguments = make(case)
    channels = arguments["mean"].shape[1]
    _, cotangents, grads = run(scale_shift, arguments)
    whole = dict(zip(differentiable(arguments), grads, strict=True))
    arguments = to_device(arguments)
    before = {name: torch.randn_like(arguments[name]) for name in ("weight", "bias")}
    for name, start in before.items():
        arguments[name].requires_grad_()
        arguments[f"{name}_main_grad"] = start.clone()
    outputs = scale_shift(*arguments.values())
    torch.autograd.backward(outputs, [c.to(o) for c, o in zip(cotangents, outputs, strict=True)])
    for name, start in before.items():
        main_grad = arguments[f"{name}_main_grad"].cpu()
        assert arguments[name].grad is None
        torch.testing.assert_close(main_grad, start.cpu() + whole[name], rtol=1e-6, atol=1e-6)
        assert main_grad[channels:].equal(start.cpu()[channels:])


def test_main_grad_of_a_frozen_vector_is_unchanged(provider):
    arguments = to_device(make("slice"))
    arguments["bias"].requires_grad_()
    arguments["weight_main_grad"] = torch.zeros_like(arguments["weight"])
    sum(output.sum() for output in scale_shift(*arguments.values())).backward()
    assert not arguments["weight_main_grad"].any()
    assert arguments["bias"].grad.any()


def test_forward_without_gradients(provider):
    arguments = to_device(make("one view"))
    with torch.no_grad():
        scale, shift = (output.cpu() for output in scale_shift(*arguments.values()))
    want = composed(*double({name: v.cpu() if hasattr(v, "cpu") else v for name, v in arguments.items()}).values())
    torch.testing.assert_close((scale.double(), shift.double()), want, rtol=1e-5, atol=1e-4)


def test_other_dtypes_use_the_native_body(policy):
    policy("auto")
    harness.check(scale_shift, OUTPUTS, make("slice") | {"weight": torch.rand(40, dtype=torch.float16)})
    if cpp.has("scale_shift")[0]:
        policy("cpp")
        with pytest.raises(InputError):
            scale_shift(*double(make("slice")).values())


@pytest.mark.parametrize("case", ["slice", "one view"])
def test_opcheck(provider, case):
    arguments = to_device(make(case))
    opcheck(torch.ops.dspnet.scale_shift.default, tuple(arguments.values()))
    for name in differentiable(arguments):
        arguments[name].requires_grad_()
    opcheck(torch.ops.dspnet.scale_shift.default, tuple(arguments.values()))
    values = [v.detach() if isinstance(v, torch.Tensor) else v for v in arguments.values()]
    opcheck(torch.ops.dspnet.scale_shift_backward.default, (values[0], values[1], *values))
    values[3], values[5] = torch.zeros_like(values[2]), torch.zeros_like(values[4])
    opcheck(torch.ops.dspnet.scale_shift_backward.default, (values[0], values[1], *values))


REFUSED = {
    "a mean of one dimension": lambda a: {"mean": a["mean"][0]},
    "a variance of other channels": lambda a: {"variance": a["variance"][:, 1:]},
    "a variance of another dtype": lambda a: {"variance": a["variance"].double()},
    "integers": lambda a: {"mean": a["mean"].int(), "variance": a["variance"].int()},
    "a weight that is too short": lambda a: {"weight": a["weight"][:12]},
    "a bias that is too short": lambda a: {"bias": a["bias"][:12]},
    "a weight that is a matrix": lambda a: {"weight": a["weight"][None]},
    "a main_grad of another length": lambda a: {"weight_main_grad": a["weight"][1:]},
    "a main_grad of nothing": lambda a: {"bias": None, "bias_main_grad": a["bias"].clone()},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_invalid_arguments_are_rejected(provider, reason):
    arguments = to_device(make("slice"))
    arguments |= REFUSED[reason](arguments)
    with pytest.raises((RuntimeError, InputError)):
        scale_shift(*arguments.values())


REFUSED_BY_LIBRARY = {reason: change for reason, change in REFUSED.items() if "main_grad" not in reason}


@needs_cpp
@pytest.mark.parametrize("reason", REFUSED)
def test_library_rejects_invalid_arguments(reason):
    arguments = make("slice")
    arguments |= REFUSED[reason](arguments)
    mean, variance, weight, _, bias, _, eps = arguments.values()
    if reason in REFUSED_BY_LIBRARY:
        with pytest.raises(RuntimeError):
            torch.ops.dspnet_cpp.scale_shift(mean, variance, weight, bias, eps)
    with pytest.raises(RuntimeError):
        torch.ops.dspnet_cpp.scale_shift_backward(mean, variance, *arguments.values())


def test_backward_rejects_gradients_of_other_shapes(policy):
    for name in ("native", "cpp"):
        if name == "cpp" and not cpp.has("scale_shift")[0]:
            continue
        policy(name)
        arguments = make("slice")
        with pytest.raises(RuntimeError):
            scale_shift_backward(arguments["mean"][:, 1:], arguments["mean"], *arguments.values())
    registry.set_policy("native")


@pytest.mark.parametrize("name", ["native", pytest.param("cpp", marks=needs_cpp)])
def test_zero_channels_return_at_once(policy, name):
    policy(name)
    nothing = torch.empty(2**60, 0)
    assert scale_shift(nothing, nothing, None, None, None, None, 1e-5)[0].shape == nothing.shape


@pytest.mark.parametrize("name", ["native", pytest.param("cpp", marks=needs_cpp)])
def test_main_grad_that_overlaps_itself_is_rejected(policy, name):
    policy(name)
    arguments = make("slice")
    arguments["weight_main_grad"] = torch.zeros(1).expand_as(arguments["weight"])
    with pytest.raises(RuntimeError, match="single memory location"):
        scale_shift_backward(arguments["mean"], arguments["mean"], *arguments.values())


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2"], indirect=True)
def test_every_build_of_the_library(run_python, capability):
    """The library's builds for older processors, by the error rule."""
    check_build(run_python, capability, "test_scale_shift", "for case in t.CASES:\n    t.check(t.make(case))\n")
