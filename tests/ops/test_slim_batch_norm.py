"""slim_batch_norm: its formulas by autograd in float64, every provider by the error rule, what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from error_rule import GRADIENT, OUTPUT, check_errors
from torch import Tensor
from torch.library import opcheck

from dspnet_fast.errors import InputError
from dspnet_fast.ops import cpp, registry, slim_batch_norm

NAMES = ("x", "weight", "bias")

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
# The native body's alone.
OTHER_CASES = {
    "sequences": ((4, 9, 7), 2),
    "contiguous images": ((4, 9, 6, 5), 2),
    "volumes": ((4, 3, 2, 3, 4), 2),
}

needs_cpp = pytest.mark.skipif(not cpp.has("slim_batch_norm")[0], reason=cpp.has("slim_batch_norm")[1])


@pytest.fixture(params=["native", pytest.param("cpp", marks=needs_cpp)])
def provider(request, policy):
    policy(request.param)
    return request.param


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


def double(arguments: dict) -> dict:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def composed(x, weight, bias, eps, views):
    """The formulas by ordinary layers, one view after another."""
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


def run(op, arguments: dict, cotangents: tuple[Tensor, ...] | None = None) -> tuple[tuple, tuple, tuple]:
    """Outputs, the cotangents that were used, and the gradients of all inputs that are there."""
    leaves = {
        name: value.detach().requires_grad_() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    outputs = op(*leaves.values())
    if cotangents is None:
        cotangents = tuple(torch.randn_like(output) for output in outputs)
    wanted = [leaves[name] for name in NAMES if leaves[name] is not None]
    loss = sum((o * c.to(o.dtype)).sum() for o, c in zip(outputs, cotangents, strict=True))
    return tuple(o.detach() for o in outputs), cotangents, torch.autograd.grad(loss, wanted)


def check(arguments: dict) -> None:
    """The provider in force against the native body in the same dtype, both against the native body in float64."""
    in_force = registry.get_policy()
    got, cotangents, grads = run(slim_batch_norm, arguments)
    registry.set_policy("native")
    exact, _, exact_grads = run(slim_batch_norm, double(arguments), cotangents)
    native, _, native_grads = run(slim_batch_norm, arguments, cotangents)
    registry.set_policy(in_force)
    assert got[0].stride() == arguments["x"].stride()
    check_errors(("y", "mean", "variance"), got, native, exact, OUTPUT)
    present = [name for name in NAMES if arguments[name] is not None]
    check_errors([f"gradient of {name}" for name in present], grads, native_grads, exact_grads, GRADIENT)


@pytest.mark.parametrize("case", CASES | OTHER_CASES)
@pytest.mark.parametrize("weight, bias", [(True, True), (True, False), (False, True), (False, False)])
def test_formulas_by_autograd(case, weight, bias):
    if case == "one row":
        pytest.skip("the deviations of a single value are zero, and so is what is compared")
    arguments = double(make(case, weight, bias))
    got, cotangents, grads = run(slim_batch_norm, arguments)
    want, _, want_grads = run(composed, arguments, cotangents)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, want_grads)


@pytest.mark.parametrize("case", CASES)
def test_each_view_is_as_batch_norm_has_it(provider, case):
    arguments = make(case)
    y, _, _ = slim_batch_norm(*arguments.values())
    if case == "one row":
        torch.testing.assert_close(y, arguments["bias"].view(1, -1, 1, 1).expand_as(y), rtol=0, atol=1e-3)
        return
    for part, got in zip(arguments["x"].chunk(arguments["views"]), y.chunk(arguments["views"])):
        want = F.batch_norm(part, None, None, arguments["weight"], arguments["bias"], True, 0.1, arguments["eps"])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weight, bias", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_error_rule(provider, nan_filled, case, weight, bias, dtype):
    check(make(case, weight, bias, dtype))


@pytest.mark.parametrize("case", OTHER_CASES)
def test_other_shapes_are_the_native_bodys(policy, case):
    arguments = make(case)
    policy("auto")
    check(arguments)
    if cpp.has("slim_batch_norm")[0]:
        policy("cpp")
        with pytest.raises(InputError):
            slim_batch_norm(*arguments.values())


@pytest.mark.parametrize("case", ["one vector", "large", "features"])
def test_moments_far_from_zero(provider, case):
    """|mean| / std = 1000, where E[x^2] - E[x]^2 in fp32 is wrong by more than the variance itself."""
    arguments = make(case)
    arguments["x"] = torch.randn_like(arguments["x"]) + 1000
    _, mean, variance = slim_batch_norm(*arguments.values())
    registry.set_policy("native")
    _, exact_mean, exact_variance = slim_batch_norm(*double(arguments).values())
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), exact_variance, rtol=1e-4, atol=0)


def test_a_pivot_far_from_the_mean(provider):
    """The first values are outliers of thousands of standard deviations."""
    x = torch.randn(1000, 24)
    x[:2] = 1000
    _, mean, variance = slim_batch_norm(x, None, None, 1e-5, 1)
    torch.testing.assert_close(mean[0].double(), x.double().mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(variance[0].double(), x.double().var(0, correction=0), rtol=1e-5, atol=0)


def test_gradients_of_other_memory_formats(provider):
    arguments = make("one vector")
    x = arguments["x"].requires_grad_()
    y, _, _ = slim_batch_norm(*arguments.values())
    cotangent = torch.randn_like(y)
    (want,) = torch.autograd.grad(y, x, cotangent, retain_graph=True)
    (got,) = torch.autograd.grad(y, x, cotangent.contiguous(), retain_graph=True)
    torch.testing.assert_close(got, want)
    torch.autograd.grad(y.sum(), x)


def test_threads(provider, nan_filled):
    threads = torch.get_num_threads()
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        for case in ("wide", "large", "many features"):
            check(make(case))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", ["odd channels", "features"])
def test_opcheck(provider, case):
    arguments = make(case)
    opcheck(torch.ops.dspnet.slim_batch_norm.default, tuple(arguments.values()))
    for name in NAMES:
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
def test_refused(provider, reason):
    arguments = make("one vector")
    arguments |= REFUSED[reason](arguments)
    with pytest.raises((RuntimeError, InputError)):
        slim_batch_norm(*arguments.values())


@needs_cpp
def test_every_build_of_the_library(run_python):
    """The builds for lesser processors, by this file's error rule, in processes of their own."""
    for capability in ("avx2", "default"):
        program = (
            "import sys, torch; from dspnet_fast.ops import registry\n"
            "sys.path.insert(0, 'tests/ops'); import test_slim_batch_norm as t\n"
            "registry.set_policy('cpp')\n"
            "assert torch.backends.cpu.get_cpu_capability() != 'AVX512'\n"
            "for case in t.CASES:\n"
            "    t.check(t.make(case))\n"
            "    t.check(t.make(case, dtype=torch.bfloat16))\n"
        )
        run_python("-c", program, ATEN_CPU_CAPABILITY=capability)
