"""norm_act_pool: its formulas by autograd in float64, every provider by the error rule, rejected arguments."""

import activations
import harness
import pytest
import torch
from activations import ACTIVATIONS, CASES, NAMES
from harness import DTYPES, check_build, device, differentiable, double, provider_of, run, to_device
from torch.library import opcheck

from dspnet_fast.errors import InputError
from dspnet_fast.ops import norm_act_pool
from dspnet_fast.ops.deferred import ACTS

provider = provider_of(norm_act_pool)


def make(
    case: str,
    act: str = "relu",
    deferred: bool = True,
    dtype: torch.dtype = torch.float32,
    gradient_means: bool = True,
) -> dict:
    """The operator's arguments."""
    images, channels, height, width, views = CASES[case]
    return {
        "x": torch.randn(images, channels, height, width).to(memory_format=torch.channels_last).to(dtype),
        "scale": 1 + torch.rand(views, channels) if deferred else None,
        "shift": torch.randn(views, channels) if deferred else None,
        "act": act,
        "gradient_means": gradient_means,
    }


def composed(x, scale, shift, act, gradient_means):
    """The formulas in ordinary PyTorch operations, view by view."""
    z = x
    if scale is not None:
        parts = zip(x.chunk(len(scale)), scale, shift)
        z = torch.cat([row[:, None, None] * part + other[:, None, None] for part, row, other in parts])
    mean = ACTIVATIONS[act](z).mean((2, 3))
    if not gradient_means:
        return mean, mean.new_empty(0), mean.new_empty(0)
    leaf = z.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(ACTIVATIONS[act](leaf).sum(), leaf)
    return mean, gradient.mean((2, 3)), (gradient * x).mean((2, 3)).detach()


def check(arguments: dict) -> None:
    """Check the active provider by the error rule."""
    _, (of_x, *_) = harness.check(norm_act_pool, ("mean", "gradient mean", "gradient x mean"), arguments)
    assert of_x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("deferred", [False, True], ids=["plain", ""])
def test_native_body_equals_the_formulas(case, act, deferred):
    arguments = double(make(case, act, deferred))
    got, cotangent, grads = run(norm_act_pool, arguments)
    want, _, want_grads = run(composed, arguments, cotangent)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, want_grads)


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("deferred", [False, True], ids=["plain", ""])
@pytest.mark.parametrize("dtype", DTYPES)
def test_provider_satisfies_the_error_rule(provider, nan_filled, case, act, deferred, dtype):
    check(make(case, act, deferred, dtype))


def test_single_row_of_scale(provider, nan_filled):
    arguments = make("one vector")
    check(arguments | {name: arguments[name][:1] for name in ("scale", "shift")})


def test_gradients_without_gradient_means_are_equal(provider):
    arguments = make("odd channels")
    (mean, *_), cotangents, grads = run(norm_act_pool, arguments)
    (other, *empty), _, other_grads = run(
        norm_act_pool, arguments | {"gradient_means": False}, cotangents[:1] + 2 * (torch.zeros(0),)
    )
    assert not any(tensor.numel() for tensor in empty)
    torch.testing.assert_close((other, *other_grads), (mean, *grads))


@pytest.mark.parametrize("act", ["identity", "relu"])
def test_other_memory_formats_give_equal_results(provider, act):
    arguments = make("wide", act)
    want, (cotangent, *rest), grads = run(norm_act_pool, arguments)
    got, _, got_grads = run(
        norm_act_pool, arguments | {"x": arguments["x"].contiguous()}, (cotangent.t().contiguous().t(), *rest)
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_grads, grads)


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 0, 3, 3)])
def test_empty_tensors(provider, nan_filled, shape):
    x = torch.randn(shape, device=device()).requires_grad_()
    small = [torch.rand(2, shape[1], device=device()).requires_grad_() for _ in range(2)]
    output, *means = norm_act_pool(x, *small, "relu", True)
    assert output.shape == means[0].shape == means[1].shape == shape[:2]
    for gradient in torch.autograd.grad(output.sum(), (x, *small)):
        assert not gradient.count_nonzero()


def test_error_rule_with_any_number_of_threads(provider, nan_filled):
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        for case in ("one image", "wide, small maps", "large"):
            check(make(case))


def test_opcheck(provider):
    arguments = to_device(make("odd channels"))
    opcheck(torch.ops.dspnet.norm_act_pool.default, tuple(arguments.values()))
    for name in differentiable(arguments):
        arguments[name].requires_grad_()
    opcheck(torch.ops.dspnet.norm_act_pool.default, tuple(arguments.values()))
    opcheck(torch.ops.dspnet.norm_act_pool.default, tuple((arguments | {"gradient_means": False}).values()))


REFUSED = activations.REFUSED | {"no positions": lambda a: {"x": a["x"][:, :, :0]}}


@pytest.mark.parametrize("reason", REFUSED)
def test_invalid_arguments_are_rejected(provider, reason):
    arguments = to_device(make("one vector"))
    arguments |= REFUSED[reason](arguments)
    with pytest.raises((RuntimeError, InputError)):
        norm_act_pool(*arguments.values())


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2"], indirect=True)
def test_every_build_of_the_library(run_python, capability):
    """The library's builds for older processors, by the error rule."""
    check_build(
        run_python,
        capability,
        "test_norm_act_pool",
        "for case in t.CASES:\n"
        "    t.check(t.make(case, 'hardswish'))\n"
        "    t.check(t.make(case, 'relu', dtype=torch.bfloat16))\n",
    )
