"""pool_deferred: the gradient of a pooled output that the backward of its convolution computes."""

import harness
import pytest
import torch
import torch.nn.functional as F
from activations import ACTIVATIONS
from harness import NARROW, check_build, double, provider_of, random_like, run, to_device
from test_conv_moments import cotangents, make, some
from torch.library import opcheck

from dspnet_fast.errors import InputError
from dspnet_fast.ops import conv_moments, norm_act_pool, scale_shift
from dspnet_fast.ops.conv_moments import conv_moments_backward
from dspnet_fast.ops.deferred import ACTS
from dspnet_fast.ops.norm_act_pool import pool_deferred

CASES = some(
    "depthwise 3",
    "depthwise 3 stride 2",
    "depthwise 5",
    "depthwise 5 stride 2",
    "depthwise tiny maps",
    "depthwise unpadded",
    "depthwise one image",
    "depthwise 2 stride 4",
    "depthwise many groups",
)


provider = provider_of(conv_moments)


def pooled(case: str, act: str = "relu", deferred: bool = True, rows: int | None = None, dtype=torch.float32) -> dict:
    """Arguments of conv_moments, and scale, shift and act of its pooled output, which is normalised if deferred."""
    arguments = make(case, gated=True, dtype=dtype)
    channels, rows = arguments["out_channels"], rows or arguments["views"]
    return arguments | {
        "pooled_scale": 1 + torch.rand(rows, channels) if deferred else None,
        "pooled_shift": torch.randn(rows, channels) if deferred else None,
        "pooled_act": act,
    }


def convolve_and_pool(*arguments):
    """y, mean and variance of conv_moments, and the mean over positions of y's activation."""
    y, *moments = conv_moments(*arguments[:12])
    return y, *moments, pool_deferred(y, *arguments[12:])


def convolve_and_pool_apart(*arguments):
    """The same results, with a backward of the pooling that computes the gradient of y."""
    y, *moments = conv_moments(*arguments[:12])
    return y, *moments, norm_act_pool(y, *arguments[12:], True)[0]


def weighted(outputs):
    """Cotangents; that of the pooled output is larger, as it has fewer elements."""
    return *cotangents(outputs[:3]), 10 * random_like(outputs[3:])[0]


def check(arguments: dict) -> None:
    """Check the active provider by the error rule."""
    harness.check(convolve_and_pool, ("y",), arguments, weighted)


def backward_arguments(case: str = "depthwise 3", act: str = "hardswish", dtype=torch.float32) -> dict:
    """Arguments of conv_moments_backward."""
    arguments = pooled(case, act, dtype=dtype)
    y, mean, variance = conv_moments.native(*list(arguments.values())[:12])
    grad_y, grad_mean, grad_variance = random_like((y, mean, variance))
    names = ("x", "scale", "shift", "act", "gate", "weight", "main_grad")
    return {
        **{"grad_y": grad_y, "grad_mean": grad_mean, "grad_variance": grad_variance},
        **{name: arguments[name] for name in names},
        **{"y": y, "mean": mean},
        **{name: arguments[name] for name in ("stride", "padding", "groups")},
        **{"input_gradient": True, "weight_gradient": True, "pooled_grad": torch.randn(y.shape[:2])},
        **{name: arguments[name] for name in ("pooled_scale", "pooled_shift", "pooled_act")},
    }


def check_backward(arguments: dict) -> None:
    """Check conv_moments_backward of the active provider by the error rule.

    Through y, a rounding error of the forward in a narrow dtype may change act'(z) by 1, so narrow gradients are
    compared for the same y.
    """
    got = [result.cpu() for result in conv_moments_backward(*to_device(arguments).values())]
    native, exact = (conv_moments_backward.native(*given.values()) for given in (arguments, double(arguments)))
    names = [f"gradient of {name}" for name in ("x", "scale", "shift", "gate", "weight")]
    harness.check_errors(names, got, native, exact, harness.GRADIENT)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("deferred", [False, True], ids=["plain", ""])
def test_native_body_equals_a_separate_pooling(case, act, deferred):
    arguments = double(pooled(case, act, deferred))
    got, used, grads = run(convolve_and_pool, arguments, weighted)
    want, _, want_grads = run(convolve_and_pool_apart, arguments, used)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, want_grads)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("act", ACTS)
def test_provider_satisfies_the_error_rule(provider, nan_filled, case, act):
    check(pooled(case, act))


@pytest.mark.parametrize("case", some("depthwise 3", "depthwise 5 stride 2", "depthwise tiny maps"))
@pytest.mark.parametrize("act", ["relu", "hardswish"])
@pytest.mark.parametrize("dtype", NARROW)
def test_error_rule_in_narrow_dtypes(provider, nan_filled, case, act, dtype):
    check_backward(backward_arguments(case, act, dtype))


def test_error_rule_without_normalisation_with_one_row_and_without_moments(provider, nan_filled):
    check(pooled("depthwise 3", deferred=False))
    check(pooled("depthwise 3", rows=1))
    check(pooled("depthwise 3", rows=4) | {"views": 0})


def test_results_with_several_threads_are_correct(provider, nan_filled):
    torch.set_num_threads(3)
    check(pooled("depthwise 3"))
    check(pooled("depthwise tiny maps"))


def block(x, weights, act, pool):
    """Depthwise convolution, batch norm of two views, squeeze-and-excite, projection."""
    depthwise, squeeze, project = weights
    y, *moments = conv_moments(x, None, None, "identity", None, depthwise, None, 8, 1, 1, 8, 2)
    rows = scale_shift(*moments, None, None, None, None, 1e-5)
    gate = torch.sigmoid(pool(y, *rows, act) @ squeeze)
    return conv_moments(y, *rows, act, gate, project, None, 6, 1, 0, 1, 0)[0]


def plain_block(x, weights, act):
    """The same network by torch.nn.functional."""
    depthwise, squeeze, project = weights
    outputs = []
    for view in x.chunk(2):
        h = ACTIVATIONS[act](F.batch_norm(F.conv2d(view, depthwise, None, 1, 1, 1, 8), None, None, training=True))
        gate = torch.sigmoid(h.mean((2, 3)) @ squeeze)
        outputs.append(F.conv2d(h * gate[:, :, None, None], project))
    return torch.cat(outputs)


@pytest.mark.parametrize("act", ACTS)
def test_squeeze_and_excite_block_equals_torch_nn(act):
    x = torch.randn(4, 8, 6, 5).double().requires_grad_()
    weights = [torch.randn(shape).double().requires_grad_() for shape in ((8, 1, 3, 3), (8, 8), (6, 8, 1, 1))]
    output, want = block(x, weights, act, pool_deferred), plain_block(x, weights, act)
    torch.testing.assert_close(output, want)
    cotangent = torch.randn_like(output)
    torch.testing.assert_close(
        torch.autograd.grad(output, (x, *weights), cotangent), torch.autograd.grad(want, (x, *weights), cotangent)
    )


@pytest.fixture
def leaves() -> list[torch.Tensor]:
    """x, weight, scale and shift of the pooling."""
    shapes = ((4, 8, 6, 5), (8, 1, 3, 3), (2, 8), (2, 8))
    return [torch.randn(shape).double().requires_grad_() for shape in shapes]


def outputs(leaves, *pools):
    """The convolution's output, and the poolings of it."""
    x, weight, *rows = leaves
    y, _, _ = conv_moments(x, None, None, "identity", None, weight, None, 8, 1, 1, 8, 2)
    return y, [pool(y, *rows, act) for pool, act in pools]


def apart(x, scale, shift, act):
    """norm_act_pool without a connection to the convolution."""
    return norm_act_pool(x, scale, shift, act, True)[0]


def test_two_poolings_of_one_output(leaves):
    weights = torch.randn(2, 4, 8).double()
    grads = []
    for pool in (pool_deferred, apart):
        y, means = outputs(leaves, (pool, "relu"), (pool, "hardswish"))
        loss = y.square().sum() + sum((mean * weight).sum() for mean, weight in zip(means, weights))
        grads.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(*grads)


def test_each_backward_of_a_retained_graph_uses_its_own_gradient(leaves):
    x, weight, scale, _ = leaves
    y, (mean,) = outputs(leaves, (pool_deferred, "relu"))
    _, (other,) = outputs(leaves, (apart, "relu"))
    for factor in (1, 3):
        got = torch.autograd.grad((factor * mean).square().sum(), leaves, retain_graph=True)
        torch.testing.assert_close(got, torch.autograd.grad((factor * other).square().sum(), leaves, retain_graph=True))
    torch.autograd.grad(mean.sum(), scale, retain_graph=True)  # does not reach the convolution
    (got,) = torch.autograd.grad(y.sum(), weight)  # does not reach the pooling
    torch.testing.assert_close(got, torch.autograd.grad(outputs(leaves)[0].sum(), weight)[0])


def test_gradient_of_other_tensors_is_computed_by_the_pooling(leaves):
    x, weight, *rows = leaves
    pointwise = torch.randn(8, 8, 1, 1).double()
    y, _, _ = conv_moments(x, None, None, "identity", None, pointwise, None, 8, 1, 0, 1, 0)
    for tensor in (x, y, 2 * outputs(leaves)[0]):
        got, want = (
            torch.autograd.grad(pool(tensor, *rows, "relu").square().sum(), (x, *rows), retain_graph=True)
            for pool in (pool_deferred, apart)
        )
        torch.testing.assert_close(got, want)


def test_pooling_without_gradients_computes_the_mean_alone(leaves):
    with torch.no_grad():
        _, (mean,) = outputs(leaves, (pool_deferred, "relu"))
    assert mean.grad_fn is None
    torch.testing.assert_close(mean, outputs(leaves, (apart, "relu"))[1][0])


def test_second_derivative_is_rejected(leaves):
    _, (mean,) = outputs(leaves, (pool_deferred, "relu"))
    (grad,) = torch.autograd.grad(mean.sum(), leaves[2], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_compiled_block_equals_eager():
    x = torch.randn(4, 8, 6, 5)
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        weights = [torch.randn(shape).requires_grad_() for shape in ((8, 1, 3, 3), (8, 8), (6, 8, 1, 1))]
        function = torch.compile(block, fullgraph=True, backend="aot_eager") if compiled else block
        output = function(x, weights, "relu", pool_deferred)
        results.append((output, *torch.autograd.grad(output.square().sum(), weights)))
    torch.testing.assert_close(*results)


def test_opcheck(provider):
    arguments = to_device(backward_arguments())
    opcheck(torch.ops.dspnet.conv_moments_backward.default, tuple(arguments.values()))


REFUSED = {
    "a gradient of other images": lambda a: {"pooled_grad": a["pooled_grad"][1:]},
    "a gradient of other channels": lambda a: {"pooled_grad": a["pooled_grad"][:, 1:]},
    "a gradient of float64": lambda a: {"pooled_grad": a["pooled_grad"].double()},
    "scale without shift": lambda a: {"pooled_shift": None},
    "rows that do not divide the batch": lambda a: {
        name: torch.ones(3, a["y"].shape[1]) for name in ("pooled_scale", "pooled_shift")
    },
    "an unknown activation": lambda a: {"pooled_act": "mish"},
}


@pytest.mark.not_by("triton")
@pytest.mark.parametrize("reason", REFUSED)
def test_invalid_arguments_are_rejected(provider, reason):
    arguments = to_device(backward_arguments())
    arguments |= REFUSED[reason](arguments)
    with pytest.raises((RuntimeError, InputError)):
        conv_moments_backward(*arguments.values())


@pytest.mark.not_by("triton")
def test_pooled_output_of_other_convolutions_is_rejected(provider):
    arguments = to_device(backward_arguments("pointwise"))
    with pytest.raises(RuntimeError, match="only depthwise"):
        conv_moments_backward(*arguments.values())


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2"], indirect=True)
def test_every_build_of_the_library(run_python, capability):
    """The library's builds for older processors, by the error rule."""
    check_build(
        run_python,
        capability,
        "test_pool_deferred",
        "for case in t.CASES:\n"
        "    t.check(t.pooled(case, 'hardswish'))\n"
        "    t.check_backward(t.backward_arguments(case, 'relu', torch.bfloat16))\n",
    )
