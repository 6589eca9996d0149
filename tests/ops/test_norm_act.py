"""norm_act: its formulas by autograd in float64, every provider by the error rule, rejected arguments."""

import activations
import harness
import pytest
import torch
from activations import ACTIVATIONS, CASES, NAMES
from harness import NARROW, check_build, device, double, provider_of, run, to_device
from torch import Tensor
from torch.library import opcheck

from dspnet_fast.errors import InputError
from dspnet_fast.ops import conv_moments, norm_act, norm_act_pool, registry
from dspnet_fast.ops.deferred import ACTS
from dspnet_fast.ops.norm_act import norm_act_backward

# Summand before the activation function.
RESIDUALS = ("no residual", "residual", "normalised residual")


provider = provider_of(norm_act)


def make(
    case: str,
    act: str = "relu",
    deferred: bool = True,
    gated: bool = False,
    residual: str = "residual",
    dtype: torch.dtype = torch.float32,
) -> dict:
    """The operator's arguments."""
    images, channels, height, width, views = CASES[case]

    def activation() -> Tensor:
        return torch.randn(images, channels, height, width).to(memory_format=torch.channels_last).to(dtype)

    def rows() -> tuple[Tensor, Tensor]:
        return 1 + torch.rand(views, channels), torch.randn(views, channels)

    scale, shift = rows()
    residual_scale, residual_shift = rows()
    normalised = residual == "normalised residual"
    return {
        "x": activation(),
        "scale": scale if deferred else None,
        "shift": shift if deferred else None,
        "act": act,
        "gate": torch.rand(images, channels) if gated else None,
        "residual": None if residual == "no residual" else activation(),
        "residual_scale": residual_scale if normalised else None,
        "residual_shift": residual_shift if normalised else None,
    }


def normalised(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """scale * x + shift, view by view."""
    if scale is None:
        return x
    parts = zip(x.chunk(len(scale)), scale, shift)
    return torch.cat([row[:, None, None] * part + other[:, None, None] for part, row, other in parts])


def composed(x, scale, shift, act, gate, residual, residual_scale, residual_shift):
    """The formula in ordinary PyTorch operations."""
    z = normalised(x, scale, shift)
    if residual is not None:
        z = z + normalised(residual, residual_scale, residual_shift)
    value = ACTIVATIONS[act](z)
    return value if gate is None else value * gate[:, :, None, None]


def check(arguments: dict) -> None:
    """Check the active provider by the error rule."""
    (output,), _ = harness.check(norm_act, ("output",), arguments)
    assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_native_body_equals_the_formulas(case, act, gated, residual):
    arguments = double(make(case, act, gated=gated, residual=residual))
    got, cotangent, grads = run(norm_act, arguments)
    want, _, want_grads = run(composed, arguments, cotangent)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, want_grads)


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_provider_satisfies_the_error_rule(provider, nan_filled, case, act, gated, residual):
    check(make(case, act, gated=gated, residual=residual))


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("act", ["identity", "relu"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_error_rule_for_inputs_without_normalisation(provider, nan_filled, case, act, residual):
    check(make(case, act, deferred=False, residual=residual))
    check(make(case, act, deferred=False, residual=residual, gated=True))


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", NARROW)
def test_error_rule_in_narrow_dtypes(provider, nan_filled, case, gated, residual, dtype):
    check(make(case, "hardswish", gated=gated, residual=residual, dtype=dtype))


@pytest.mark.parametrize("first, second", [(1, 2), (2, 1), (1, 1), (4, 2)])
def test_input_and_residual_may_have_different_numbers_of_rows(provider, nan_filled, first, second):
    arguments = make("one vector", residual="normalised residual")
    for names, rows in (("scale", "shift"), first), (("residual_scale", "residual_shift"), second):
        arguments |= {name: torch.rand(rows, 16) for name in names}
    check(arguments)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("residual", RESIDUALS[1:])
@pytest.mark.parametrize("residual_gradient", [False, True])
@pytest.mark.parametrize("deferred", [False, True])
def test_gradient_of_the_residual_is_returned_only_if_requested(
    provider, nan_filled, act, gated, residual, residual_gradient, deferred
):
    arguments = make("odd channels", act, deferred, gated, residual)
    arguments = {"grad": torch.randn_like(arguments["x"])} | arguments
    got = norm_act_backward(*to_device(arguments).values(), residual_gradient)
    registry.set_policy("native")
    want = norm_act_backward(*double(arguments).values(), residual_gradient)
    assert [g.numel() > 0 for g in got[4:]] == [
        residual_gradient,
        *2 * [residual_gradient and residual == "normalised residual"],
    ]
    torch.testing.assert_close(got, want, check_dtype=False, check_device=False, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act", ["identity", "relu"])
def test_other_memory_formats_give_equal_results(provider, act):
    arguments = make("wide", act, gated=True, residual="normalised residual")
    want, (cotangent,), grads = run(norm_act, arguments)
    arguments |= {name: arguments[name].contiguous() for name in ("x", "residual")}
    for layout in (cotangent.contiguous(), cotangent[:1, :1, :1, :1].expand_as(cotangent)):
        got, _, got_grads = run(norm_act, arguments, (layout,))
        assert got[0].is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, want)
        if layout.is_contiguous():
            torch.testing.assert_close(got_grads, grads)


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0, 3), (2, 0, 3, 3)])
def test_empty_tensors(provider, nan_filled, shape):
    x = torch.randn(shape, device=device()).requires_grad_()
    small = [torch.rand(2, shape[1], device=device()).requires_grad_() for _ in range(2)]
    gate = torch.rand(shape[:2], device=device()).requires_grad_()
    output = norm_act(x, *small, "relu", gate, x.detach(), None, None)
    assert output.shape == x.shape
    for gradient in torch.autograd.grad(output.sum(), (x, *small, gate)):
        assert not gradient.count_nonzero()


def test_error_rule_with_any_number_of_threads(provider, nan_filled):
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        for case in ("one image", "wide, small maps", "large"):
            check(make(case, gated=True, residual="normalised residual"))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_opcheck(provider, residual):
    arguments = to_device(make("odd channels", gated=True, residual=residual))
    opcheck(torch.ops.dspnet.norm_act.default, tuple(arguments.values()))
    for value in arguments.values():
        if isinstance(value, Tensor):
            value.requires_grad_()
    opcheck(torch.ops.dspnet.norm_act.default, tuple(arguments.values()))


def test_block_compiles_without_a_graph_break(provider):
    """All operators of deferred normalisation under torch.compile, forward and backward."""
    images, channels = 4, 16

    def block(x, weight, gamma, beta, first):
        y, mean, variance = conv_moments(x, None, None, "identity", None, weight, None, channels, 1, 1, 1, 2)
        scale = gamma * (variance + 1e-5).rsqrt()
        shift = beta - mean * scale
        gate = torch.sigmoid(norm_act_pool(y, scale, shift, "hardswish", True)[0] @ first)
        return norm_act(y, scale, shift, "hardswish", gate, x, None, None)

    inputs = [
        torch.randn(images, channels, 6, 6).to(memory_format=torch.channels_last),
        torch.randn(channels, channels, 3, 3) / 12,
        torch.rand(channels),
        torch.randn(channels),
        torch.randn(channels, channels),
    ]
    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.to(device(), copy=True).requires_grad_() for tensor in inputs]
        output = function(*leaves)
        results.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
    torch.testing.assert_close(*results)


REFUSED = activations.REFUSED | {
    "scale of another dtype": lambda a: {"scale": a["scale"].double()},
    "a gate of other images": lambda a: {"gate": a["gate"][1:]},
    "a residual of another shape": lambda a: {"residual": a["residual"][1:]},
    "a residual of another dtype": lambda a: {"residual": a["residual"].bfloat16()},
    "residual_scale without residual_shift": lambda a: {"residual_shift": None},
    "residual_scale of other channels": lambda a: {"residual_scale": a["residual_scale"][:, 1:]},
    "residual_scale without a residual": lambda a: {"residual": None},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_invalid_arguments_are_rejected(provider, reason):
    arguments = to_device(make("one vector", gated=True, residual="normalised residual"))
    arguments |= REFUSED[reason](arguments)
    with pytest.raises((RuntimeError, InputError)):
        norm_act(*arguments.values())


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2"], indirect=True)
def test_every_build_of_the_library(run_python, capability):
    """The library's builds for older processors, by the error rule."""
    check_build(
        run_python,
        capability,
        "test_norm_act",
        "for case in t.CASES:\n"
        "    for residual in t.RESIDUALS:\n"
        "        t.check(t.make(case, 'hardswish', gated=True, residual=residual))\n"
        "        t.check(t.make(case, 'relu', residual=residual, dtype=torch.bfloat16))\n",
    )
