"""conv_norm: every provider by the error rule, and compared with conv_moments and scale_shift one after another."""

import harness
import pytest
import torch
from activations import ACTIVATIONS
from harness import NARROW, differentiable, double, provider_of, random_like, run, to_device
from test_conv_moments import REFUSED, needs_cpp, some
from test_conv_moments import make as make_convolution
from test_scale_shift import AFFINE
from torch import Tensor
from torch.library import opcheck

from dspnet_fast.errors import InputError
from dspnet_fast.ops import conv_moments, conv_norm, registry, scale_shift, triton
from dspnet_fast.ops.conv_norm import SPLIT
from dspnet_fast.ops.norm_act_pool import pool_deferred

CASES = some(
    "pointwise",
    "pointwise odd",
    "pointwise wide",
    "pointwise of one",
    "pointwise many views",
    "depthwise 3",
    "depthwise 3 stride 2",
    "depthwise 5",
    "depthwise tiny maps",
    "dense 3",
    "stem",
    "dense 1 stride 2",
)

provider = provider_of(conv_norm)


def make(case: str, weight: bool = True, bias: bool = True, **options) -> dict:
    """The operator's arguments; the vectors have more elements than the convolution has channels."""
    arguments = make_convolution(case, **options)
    size = arguments["weight"].shape[0] + 3
    return arguments | {
        "norm_weight": 1 + torch.rand(size) if weight else None,
        "norm_weight_main_grad": None,
        "norm_bias": torch.randn(size) if bias else None,
        "norm_bias_main_grad": None,
        "eps": 1e-5,
    }


def in_two_calls(*arguments):
    """The same results by the two operators."""
    y, *moments = conv_moments(*arguments[:SPLIT])
    return y, *scale_shift(*moments, *arguments[SPLIT:]), *moments


def cotangents(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Random cotangents; those of scale and shift are larger, as y has many more elements."""
    counts = outputs[0].numel() / max(outputs[1].numel(), 1)
    of_y, *of_rows = random_like(outputs)
    return of_y, *(counts**0.5 * of_row for of_row in of_rows)


def check(arguments: dict) -> None:
    """Check y and gradients of the active provider by the error rule, and scale and shift against the moments."""
    (y, *rows, mean, variance), _ = harness.check(conv_norm, ("y",), arguments, cotangents)
    vectors = list(double(arguments).values())[SPLIT:]
    want = scale_shift.native(mean.double(), variance.double(), *vectors)
    for row, exact in zip(rows, want, strict=True):
        torch.testing.assert_close(row.double(), exact, rtol=1e-6, atol=1e-6 * exact.abs().max().item())
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_provider_satisfies_the_error_rule(provider, nan_filled, case, gated):
    check(make(case, act="hardswish", gated=gated))


@pytest.mark.parametrize("case", some("pointwise", "depthwise 3", "dense 3"))
@pytest.mark.parametrize("weight, bias", AFFINE)
def test_error_rule_without_vectors(provider, nan_filled, case, weight, bias):
    check(make(case, weight, bias))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", NARROW)
def test_error_rule_in_narrow_dtypes(provider, nan_filled, case, dtype):
    if case == "pointwise of one":
        pytest.skip("the native body may be exact in a single weight by chance")
    check(make(case, act="relu", dtype=dtype))


@pytest.mark.parametrize("case", CASES)
def test_native_body_equals_the_formulas(policy, case):
    policy("native")
    arguments = double(make(case))
    convolution, (gamma, _, beta, _, eps) = list(arguments.values())[:SPLIT], list(arguments.values())[SPLIT:]
    y, scale, shift, mean, variance = conv_norm(*arguments.values())
    h = ACTIVATIONS["relu"](
        torch.cat(
            [
                part * row[0][:, None, None] + row[1][:, None, None]
                for part, row in zip(
                    convolution[0].chunk(arguments["views"]), zip(convolution[1], convolution[2]), strict=True
                )
            ]
        )
    )
    weight = arguments["weight"][: arguments["out_channels"], : h.shape[1] // arguments["groups"]]
    want = torch.conv2d(h, weight, None, arguments["stride"], arguments["padding"], 1, arguments["groups"])
    torch.testing.assert_close(y, want)
    channels = y.shape[1]
    for view, part in enumerate(y.chunk(arguments["views"])):
        norm = torch.nn.functional.batch_norm(part, None, None, gamma[:channels], beta[:channels], True, 0.0, eps)
        torch.testing.assert_close(part * scale[view, :, None, None] + shift[view, :, None, None], norm)
        torch.testing.assert_close(mean[view], part.mean((0, 2, 3)))
        torch.testing.assert_close(variance[view], part.var((0, 2, 3), correction=0))


@pytest.mark.parametrize("case", some("pointwise odd", "depthwise 3", "dense 3"))
def test_results_equal_those_of_two_calls(provider, case):
    """Also what is added to the main_grads, with a gradient that a pooling leaves to the convolution."""

    def results(normalized):
        torch.manual_seed(0)
        arguments = to_device(make(case))
        leaves = [arguments[name].requires_grad_() for name in differentiable(arguments)]
        buffers = {name: torch.ones_like(arguments[name]) for name in ("weight", "norm_weight", "norm_bias")}
        arguments |= {"main_grad" if name == "weight" else f"{name}_main_grad": b for name, b in buffers.items()}
        y, *rows, mean, variance = normalized(*arguments.values())
        pooled = pool_deferred(y, *rows, "hardswish")
        loss = y.square().sum() + sum(row.square().sum() for row in rows) + (pooled * pooled.sigmoid()).sum()
        loss.backward()
        assert all(arguments[name].grad is None for name in buffers)
        grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
        return [y, *rows, mean, variance, pooled, *grads, *buffers.values()]

    tolerance = 1e-5 if harness.device() == "cuda" else 0
    for ours, theirs in zip(results(conv_norm), results(in_two_calls), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("used", [0, 1, 2])
def test_gradients_of_one_result_equal_those_of_two_calls(provider, used):
    arguments = to_device(make("depthwise 3"))
    given = [arguments[name].requires_grad_() for name in differentiable(arguments)]

    def gradients_of(results):
        return torch.autograd.grad(results[used].square().sum(), given, allow_unused=True)

    for ours, theirs in zip(
        gradients_of(conv_norm(*arguments.values())), gradients_of(in_two_calls(*arguments.values())), strict=True
    ):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


def test_moments_have_no_gradients(provider):
    arguments = to_device(make("pointwise"))
    arguments["weight"].requires_grad_()
    *differentiated, mean, variance = conv_norm(*arguments.values())
    assert all(output.requires_grad for output in differentiated)
    assert not mean.requires_grad and not variance.requires_grad


def test_main_grads_of_frozen_vectors_are_unchanged(provider):
    arguments = to_device(make("pointwise"))
    arguments["x"].requires_grad_()
    for name in ("norm_weight", "norm_bias"):
        arguments[f"{name}_main_grad"] = torch.zeros_like(arguments[name])
    sum(output.sum() for output in conv_norm(*arguments.values())).backward()
    assert arguments["x"].grad is not None
    assert not any(arguments[f"{name}_main_grad"].any() for name in ("norm_weight", "norm_bias"))


@pytest.mark.parametrize("case", some("pointwise", "depthwise 3", "dense 3"))
def test_forward_without_gradients_or_moments(provider, case):
    arguments = to_device(make(case))
    with torch.no_grad():
        whole = conv_norm(*arguments.values())
        y, *rows = conv_norm(*(arguments | {"views": 0}).values())
    torch.testing.assert_close(y, whole[0])
    assert all(row.shape == (0, y.shape[1]) for row in rows)


def test_second_derivative_is_rejected(provider):
    arguments = to_device(make("pointwise"))
    arguments["x"].requires_grad_()
    y = conv_norm(*arguments.values())[0]
    (grad,) = torch.autograd.grad(y.square().sum(), arguments["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative|no autograd|does not require grad"):
        grad.sum().backward()


@pytest.mark.parametrize("case", some("pointwise", "depthwise 3"))
def test_opcheck(provider, case):
    arguments = to_device(make(case, gated=True))
    opcheck(torch.ops.dspnet.conv_norm.default, tuple(arguments.values()))
    for name in differentiable(arguments):
        arguments[name].requires_grad_()
    opcheck(torch.ops.dspnet.conv_norm.default, tuple(arguments.values()))


@pytest.mark.parametrize("reason", REFUSED)
def test_invalid_convolutions_are_rejected(provider, reason):
    arguments = to_device(make("pointwise", gated=True))
    arguments |= REFUSED[reason](arguments)
    with pytest.raises((RuntimeError, InputError)):
        conv_norm(*arguments.values())


REFUSED_VECTORS = {
    "a weight that is too short": lambda a: {"norm_weight": a["norm_weight"][: a["out_channels"] - 1]},
    "a bias that is a matrix": lambda a: {"norm_bias": a["norm_bias"][None]},
    "a main_grad of another length": lambda a: {"norm_weight_main_grad": a["norm_weight"][1:]},
    "a main_grad of nothing": lambda a: {"norm_bias": None, "norm_bias_main_grad": a["norm_bias"].clone()},
}


@pytest.mark.parametrize("reason", REFUSED_VECTORS)
def test_invalid_vectors_are_rejected(provider, reason):
    arguments = to_device(make("pointwise"))
    arguments |= REFUSED_VECTORS[reason](arguments)
    with pytest.raises((RuntimeError, InputError)):
        conv_norm(*arguments.values())


@pytest.mark.parametrize("policy_name", ["auto", "native"])
def test_other_vectors_are_computed_by_the_two_operators(policy, policy_name):
    policy(policy_name)
    arguments = make("pointwise") | {"norm_weight": torch.rand(43, dtype=torch.float16)}
    got, used, grads = run(conv_norm, arguments)
    want, _, want_grads = run(in_two_calls, arguments, (*used[:3], *map(torch.zeros_like, used[3:])))
    assert all(map(torch.equal, (*got, *grads), (*want, *want_grads)))


def test_autocast_casts_the_input_alone(policy):
    policy("auto")
    arguments = make("pointwise")
    with torch.autocast("cpu", torch.bfloat16):
        y, scale, *_ = conv_norm(*arguments.values())
    assert (y.dtype, scale.dtype) == (torch.bfloat16, torch.float32)


MERGED = ["conv_moments_depthwise_kernel", "merge_moments_kernel"]
BACKWARD = ["scale_shift_backward_kernel", "conv_moments_depthwise_backward_kernel", "sums_kernel"]


def test_layer_takes_two_launches_forward_and_three_backward(provider):
    if provider != "triton":
        pytest.skip("only triton launches kernels")
    arguments = to_device(make("depthwise 3"))
    for name in differentiable(arguments):
        arguments[name].requires_grad_()
    launched = []
    with triton.kernels("launch").observed(lambda kernel, *_: launched.append(kernel.fn.__name__)):
        outputs = conv_norm(*arguments.values())
        sum(output.sum() for output in outputs[:3]).backward()
    assert launched == MERGED + BACKWARD


@needs_cpp
@pytest.mark.parametrize("operator", ["conv_norm", "conv_moments", "scale_shift"])
def test_provider_refused_for_the_operator_or_a_part_is_not_used(policy, operator):
    policy("auto")
    assert registry.serving("cpu")["conv_norm"] == "cpp"
    registry.use_findings({(operator, "cpp"): "off by 1"})
    try:
        serving = registry.serving("cpu")
        assert serving["conv_norm"] == "native" and serving[operator] == "native"
        others = {"conv_moments", "scale_shift"} - {operator}
        assert all(serving[other] == "cpp" for other in others)
    finally:
        registry.use_findings({})
