"""slim_linear: values and gradients equal a linear layer with the sliced weight; rejected arguments."""

import pytest
import torch
import torch.nn.functional as F
from harness import NARROW, check, check_build, device, differentiable, provider_of, run, to_device
from torch.library import opcheck

from dspnet_fast.errors import InputError
from dspnet_fast.ops import slim_linear

# (shape of x, shape of the full weight, out_features)
CASES = {
    "whole": ((5, 12), (7, 12), 7),
    "sliced": ((5, 9), (16, 12), 7),
    "three dimensions": ((2, 3, 9), (16, 12), 7),
    "one row": ((9,), (16, 12), 7),
    "pointwise weight": ((5, 9), (16, 12, 1, 1), 7),
    "no rows": ((0, 9), (16, 12), 7),
    "several panels": ((70, 300), (210, 310), 200),
    "deep": ((3, 1100), (40, 1100), 17),
    "a panel of rows": ((60, 1300), (100, 1310), 90),
    "half a panel of AVX2": ((14, 300), (40, 300), 33),
    "many rows": ((300, 20), (40, 24), 33),
    "many outputs": ((9, 20), (300, 24), 290),
}


provider = provider_of(slim_linear)


def make(case: str, biased: bool = True, dtype: torch.dtype = torch.float64) -> dict:
    """The operator's arguments."""
    shape, full, out_features = CASES[case]
    return {
        "x": torch.randn(shape, dtype=dtype),
        "weight": torch.randn(full, dtype=dtype),
        "bias": torch.randn(out_features, dtype=dtype) if biased else None,
        "main_grad": None,
        "out_features": out_features,
    }


def composed(x, weight, bias, main_grad, out_features):
    """PyTorch's linear layer with the sliced weight; autograd computes the gradient of the full weight."""
    return F.linear(x, weight.flatten(1)[:out_features, : x.shape[-1]], bias)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("biased", [True, False], ids=["", "no bias"])
def test_native_body_equals_a_sliced_linear_layer(case, biased):
    arguments = make(case, biased)
    got, cotangent, grads = run(slim_linear, arguments)
    want, _, want_grads = run(composed, arguments, cotangent)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, want_grads)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("biased", [True, False], ids=["", "no bias"])
def test_provider_satisfies_the_error_rule(provider, nan_filled, case, biased):
    check(slim_linear, ("y",), make(case, biased, torch.float32))


@pytest.mark.not_by("cpp")
@pytest.mark.parametrize("case", ["sliced", "three dimensions", "several panels"])
@pytest.mark.parametrize("dtype", NARROW)
def test_error_rule_in_narrow_dtypes(provider, nan_filled, case, dtype):
    check(slim_linear, ("y",), make(case, dtype=dtype))


def test_results_with_several_threads_are_correct_and_reproducible(provider, nan_filled):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for case in ("several panels", "many outputs", "a panel of rows"):
            arguments = make(case, dtype=torch.float32)
            check(slim_linear, ("y",), arguments)
            first, used, first_grads = run(slim_linear, arguments)
            again, _, again_grads = run(slim_linear, arguments, used)
            assert all(map(torch.equal, (*first, *first_grads), (*again, *again_grads)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_added_to_the_prefix_of_main_grad(provider, case):
    arguments = make(case, dtype=torch.float32)
    _, (cotangent,), (_, whole, _) = run(slim_linear, arguments)
    before = torch.randn_like(whole)
    arguments = to_device(arguments | {"main_grad": before.clone()})
    arguments["weight"].requires_grad_()
    slim_linear(*arguments.values()).backward(cotangent.to(device()))
    assert arguments["weight"].grad is None
    main_grad = arguments["main_grad"].cpu()
    torch.testing.assert_close(main_grad, before + whole)
    inputs = arguments["x"].shape[-1]
    assert main_grad[arguments["out_features"] :].equal(before[arguments["out_features"] :])
    assert main_grad[:, inputs:].equal(before[:, inputs:])


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_single_input_requires_a_gradient(provider, name):
    arguments = to_device(make("sliced", dtype=torch.float32))
    arguments[name].requires_grad_()
    slim_linear(*arguments.values()).sum().backward()
    assert arguments[name].grad is not None


@pytest.mark.parametrize("case", ["sliced", "three dimensions", "pointwise weight"])
@pytest.mark.parametrize("biased", [True, False], ids=["", "no bias"])
def test_opcheck(provider, case, biased):
    arguments = to_device(make(case, biased, torch.float32))
    opcheck(
        torch.ops.dspnet.slim_linear.default,
        tuple((arguments | {"main_grad": torch.zeros_like(arguments["weight"])}).values()),
    )
    for name in differentiable(arguments):
        arguments[name].requires_grad_()
    opcheck(torch.ops.dspnet.slim_linear.default, tuple(arguments.values()))


REFUSED = {
    "a weight of three dimensions": lambda a: {"weight": a["weight"][None]},
    "a weight that is no pointwise convolution's": lambda a: {
        "weight": a["weight"][:, :, None, None].expand(-1, -1, 2, 1)
    },
    "more outputs than the weight": lambda a: {"out_features": 17},
    "no outputs": lambda a: {"out_features": 0},
    "more inputs than the weight": lambda a: {"weight": a["weight"][:, :3]},
    "no inputs": lambda a: {"x": a["x"][:, :0]},
    "a bias of other outputs": lambda a: {"bias": a["bias"][:3]},
    "a main_grad of another shape": lambda a: {"main_grad": a["weight"][1:]},
    "a main_grad of another dtype": lambda a: {"main_grad": a["weight"].double()},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_invalid_arguments_are_rejected(provider, reason):
    arguments = to_device(make("sliced", dtype=torch.float32))
    arguments |= REFUSED[reason](arguments)
    with pytest.raises((RuntimeError, InputError)):  # InputError: the chosen provider does not support the dtype
        slim_linear(*arguments.values())


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2"], indirect=True)
def test_every_build_of_the_library(run_python, capability):
    """The library's builds for older processors, by the error rule."""
    check_build(
        run_python,
        capability,
        "test_slim_linear",
        "for case in t.CASES:\n    t.check(t.slim_linear, ('y',), t.make(case, dtype=torch.float32))\n",
    )
