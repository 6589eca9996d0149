"""slim_batch_norm: its formulas by autograd in float64, every provider by the error rule, rejected arguments."""

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import DTYPES, check_build, device, differentiable, double, provider_of, run, to_device
from torch.library import opcheck

from dspnet_fast.errors import InputError
from dspnet_fast.ops import cpp, registry, slim_batch_norm

# (shape, views). Images are channels-last, unless a case says otherwise.
CASES = {
    "one vector": ((4, 16, 6, 5), 2),
    "odd channels": ((6, 13, 7, 5), 3),
    "wide": ((4, 200, 5, 6), 2),
    "1x1 maps": ((6, 72, 1, 1), 2),
    "large": ((4, 40, 23, 21), 2),
    "one channel": ((2, 1, 3, 3), 1),
    "one row": ((2, 24, 1, 1), 2),
    "features": ((64, 130), 2),
    "many features": ((600, 33), 1),
}
# Supported by the native body only.
OTHER_CASES = {
    "sequences": ((4, 9, 7), 2),
    "contiguous images": ((4, 9, 6, 5), 2),
    "volumes": ((4, 3, 2, 3, 4), 2),
}


provider = provider_of(slim_batch_norm)


def make(case: str, weight: bool = True, bias: bool = True, dtype: torch.dtype = torch.float32) -> dict:
    """The operator's arguments."""
    shape, views = (CASES | OTHER_CASES)[case]
    x = 3 * torch.randn(shape) + torch.randn(shape[1]).view(-1, *(len(shape) - 2) * [1])
    if case in CASES and x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
    return {
        "x": x.to(dtype),
        "weight": 1 + torch.rand(shape[1]) if weight else None,
        "bias": torch.randn(shape[1]) if bias else None,
        "eps": 1e-5,
        "views": views,
    }


def composed(x, weight, bias, eps, views):
    """The formulas in ordinary PyTorch operations, view by view."""
    y, means, variances = [], [], []
    for part in x.chunk(views):
        dims = (0, *range(2, x.ndim))
        means.append(part.mean(dims))
        variances.append(part.var(dims, correction=0))
        shape = (1, -1, *(x.ndim - 2) * [1])
        part = (part - means[-1].view(shape)) / (variances[-1].view(shape) + eps).sqrt()
        part = part if weight is None else part * weight.view(shape)
        y.append(part if bias is None else part + bias.view(shape))
    return torch.cat(y), torch.stack(means), torch.stack(variances)


def check(arguments: dict) -> None:
    """Check the active provider by the error rule."""
    (y, _, _), _ = harness.check(slim_batch_norm, ("y", "mean", "variance"), arguments)
    assert y.stride() == arguments["x"].stride()


@pytest.mark.parametrize("case", CASES | OTHER_CASES)
@pytest.mark.parametrize("weight, bias", [(True, True), (True, False), (False, True), (False, False)])
def test_native_body_equals_the_formulas(case, weight, bias):
    if case == "one row":
        pytest.skip("the deviation of a single value is zero, and so are the results")
    arguments = double(make(case, weight, bias))
    got, cotangents, grads = run(slim_batch_norm, arguments)
    want, _, want_grads = run(composed, arguments, cotangents)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, want_grads)


@pytest.mark.parametrize("case", CASES)
def test_each_view_equals_torch_batch_norm(provider, case):
    arguments = make(case)
    y = slim_batch_norm(*to_device(arguments).values())[0].cpu()
    if case == "one row":
        torch.testing.assert_close(y, arguments["bias"].view(1, -1, 1, 1).expand_as(y), rtol=0, atol=1e-3)
        return
    for part, got in zip(arguments["x"].chunk(arguments["views"]), y.chunk(arguments["views"])):
        want = F.batch_norm(part, None, None, arguments["weight"], arguments["bias"], True, 0.1, arguments["eps"])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weight, bias", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_provider_satisfies_the_error_rule(provider, nan_filled, case, weight, bias, dtype):
    check(make(case, weight, bias, dtype))


@pytest.mark.parametrize("case", OTHER_CASES)
def test_other_shapes_use_the_native_body(policy, case):
    arguments = make(case)
    policy("auto")
    check(arguments)
    if cpp.has("slim_batch_norm")[0]:
        policy("cpp")
        with pytest.raises(InputError):
            slim_batch_norm(*arguments.values())


@pytest.mark.parametrize("case", ["one vector", "large", "features"])
def test_moments_are_exact_for_means_far_from_zero(provider, case):
    """|mean| / std = 1000, where the error of E[x^2] - E[x]^2 in fp32 exceeds the variance."""
    arguments = make(case)
    arguments["x"] = torch.randn_like(arguments["x"]) + 1000
    _, mean, variance = slim_batch_norm(*to_device(arguments).values())
    registry.set_policy("native")
    _, exact_mean, exact_variance = slim_batch_norm(*double(arguments).values())
    torch.testing.assert_close(mean.cpu().double(), exact_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.cpu().double(), exact_variance, rtol=1e-4, atol=0)


def test_moments_are_exact_if_the_first_values_are_outliers(provider):
    """A pivot taken from the first values would be thousands of standard deviations from the mean."""
    x = torch.randn(1000, 24)
    x[:2] = 1000
    _, mean, variance = (output.cpu() for output in slim_batch_norm(x.to(device()), None, None, 1e-5, 1))
    torch.testing.assert_close(mean[0].double(), x.double().mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(variance[0].double(), x.double().var(0, correction=0), rtol=1e-5, atol=0)


def test_gradients_in_other_memory_formats_give_equal_results(provider):
    arguments = to_device(make("one vector"))
    x = arguments["x"].requires_grad_()
    y, _, _ = slim_batch_norm(*arguments.values())
    cotangent = torch.randn_like(y)
    (want,) = torch.autograd.grad(y, x, cotangent, retain_graph=True)
    (got,) = torch.autograd.grad(y, x, cotangent.contiguous(), retain_graph=True)
    torch.testing.assert_close(got, want)
    torch.autograd.grad(y.sum(), x)


def test_error_rule_with_any_number_of_threads(provider, nan_filled):
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        for case in ("wide", "large", "many features"):
            check(make(case))


@pytest.mark.parametrize("case", ["odd channels", "features"])
def test_opcheck(provider, case):
    arguments = to_device(make(case))
    opcheck(torch.ops.dspnet.slim_batch_norm.default, tuple(arguments.values()))
    for name in differentiable(arguments):
        arguments[name].requires_grad_()
    opcheck(torch.ops.dspnet.slim_batch_norm.default, tuple(arguments.values()))


REFUSED = {
    "x of one dimension": lambda a: {"x": a["x"][:, 0, 0, 0]},
    "integers": lambda a: {"x": a["x"].int()},
    "no images": lambda a: {"x": a["x"][:0]},
    "views that do not divide the batch": lambda a: {"views": 3},
    "no views": lambda a: {"views": 0},
    "a weight of other channels": lambda a: {"weight": a["weight"][1:]},
    "a bias of other channels": lambda a: {"bias": a["bias"][1:]},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_invalid_arguments_are_rejected(provider, reason):
    arguments = to_device(make("one vector"))
    arguments |= REFUSED[reason](arguments)
    with pytest.raises((RuntimeError, InputError)):
        slim_batch_norm(*arguments.values())


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2"], indirect=True)
def test_every_build_of_the_library(run_python, capability):
    """The library's builds for older processors, by the error rule."""
    check_build(
        run_python,
        capability,
        "test_slim_batch_norm",
        "for case in t.CASES:\n    t.check(t.make(case))\n    t.check(t.make(case, dtype=torch.bfloat16))\n",
    )
