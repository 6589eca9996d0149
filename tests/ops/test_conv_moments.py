"""conv_moments: its formulas by autograd in float64, every provider by the error rule, rejected arguments."""

import harness
import pytest
import torch
import torch.nn.functional as F
from activations import ACTIVATIONS
from harness import NARROW, check_build, differentiable, double, provider_of, random_like, run, to_device
from torch import Tensor
from torch.library import opcheck

from dspnet_fast.errors import InputError
from dspnet_fast.ops import conv_moments, cpp, registry, triton
from dspnet_fast.ops.deferred import ACTS
from dspnet_fast.verification import error_rule

# (images, channels in, height, width, channels out, full weight [O, I], kernel, stride, padding, groups, views)
CASES = {
    "pointwise": (4, 24, 6, 5, 16, (40, 32), 1, 1, 0, 1, 2),
    "pointwise odd": (6, 13, 7, 5, 17, (19, 15), 1, 1, 0, 1, 3),
    "pointwise wide": (4, 72, 5, 6, 200, (200, 80), 1, 1, 0, 1, 2),
    "pointwise deep": (4, 200, 5, 5, 72, (90, 200), 1, 1, 0, 1, 2),
    "pointwise one view": (3, 16, 9, 9, 24, (24, 16), 1, 1, 0, 1, 1),
    "pointwise many rows": (8, 16, 33, 31, 64, (64, 16), 1, 1, 0, 1, 2),
    "pointwise of one": (2, 1, 3, 3, 1, (1, 1), 1, 1, 0, 1, 1),
    "pointwise tails": (4, 40, 7, 7, 136, (136, 40), 1, 1, 0, 1, 2),
    "pointwise many panels": (2, 330, 5, 3, 300, (300, 330), 1, 1, 0, 1, 2),
    "pointwise deeper than a block": (4, 1000, 3, 3, 24, (24, 1000), 1, 1, 0, 1, 2),
    "pointwise one row": (1, 33, 1, 1, 70, (70, 33), 1, 1, 0, 1, 1),
    "pointwise many views": (12, 30, 3, 4, 50, (64, 31), 1, 1, 0, 1, 12),
    "pointwise 1x1 maps": (6, 20, 1, 1, 12, (12, 20), 1, 1, 0, 1, 2),
    "depthwise 3": (4, 24, 9, 8, 24, (40, 1), 3, 1, 1, 24, 2),
    "depthwise 3 stride 2": (4, 24, 9, 8, 24, (40, 1), 3, 2, 1, 24, 2),
    "depthwise 5": (4, 17, 9, 10, 17, (20, 1), 5, 1, 2, 17, 2),
    "depthwise 5 stride 2": (4, 35, 10, 9, 35, (35, 1), 5, 2, 2, 35, 2),
    "depthwise large": (4, 16, 48, 48, 16, (16, 1), 3, 1, 1, 16, 2),
    "depthwise large stride 2": (4, 40, 48, 48, 40, (40, 1), 3, 2, 1, 40, 2),
    "depthwise tiny maps": (4, 48, 2, 1, 48, (48, 1), 5, 1, 2, 48, 2),
    "depthwise 3x3 maps": (6, 96, 3, 3, 96, (120, 1), 5, 1, 2, 96, 2),
    "depthwise unpadded": (2, 9, 6, 7, 9, (9, 1), 3, 1, 0, 9, 1),
    "depthwise 7": (2, 9, 8, 8, 9, (9, 1), 7, 1, 3, 9, 2),
    "depthwise one image": (1, 40, 13, 15, 40, (40, 1), 3, 1, 1, 40, 1),
    "depthwise one image stride 2": (1, 33, 21, 14, 33, (33, 1), 5, 2, 2, 33, 1),
    "depthwise more padding than kernel": (2, 20, 5, 4, 20, (20, 1), 3, 1, 4, 20, 2),
    "depthwise padded stride 2": (4, 20, 5, 6, 20, (20, 1), 3, 2, 3, 20, 2),
    "depthwise 5 unpadded stride 2": (3, 19, 8, 12, 19, (19, 1), 5, 2, 0, 19, 3),
    "depthwise 2": (4, 18, 7, 8, 18, (18, 1), 2, 1, 1, 18, 2),
    "depthwise 4 stride 2": (4, 18, 9, 7, 18, (18, 1), 4, 2, 1, 18, 2),
    "depthwise 3 stride 3": (2, 21, 11, 13, 21, (21, 1), 3, 3, 1, 21, 2),
    "depthwise 2 stride 4": (2, 21, 11, 13, 21, (21, 1), 2, 4, 1, 21, 1),
    "depthwise 1": (2, 21, 5, 6, 21, (21, 1), 1, 1, 0, 21, 1),
    "depthwise many groups": (2, 1000, 4, 7, 1000, (1000, 1), 5, 1, 2, 1000, 2),
    "depthwise row of tiles": (2, 8, 3, 37, 8, (8, 1), 5, 1, 2, 8, 2),
    "dense 3": (4, 8, 9, 8, 16, (24, 12), 3, 1, 1, 1, 2),
    "dense 3 stride 2": (4, 13, 9, 8, 17, (24, 16), 3, 2, 1, 1, 2),
    "dense wide": (2, 70, 6, 6, 80, (80, 70), 3, 1, 1, 1, 2),
    "stem": (4, 3, 17, 16, 16, (16, 3), 3, 2, 1, 1, 2),
    "stem 7": (4, 3, 19, 20, 20, (24, 3), 7, 2, 3, 1, 2),
    "dense 1 stride 2": (4, 16, 8, 9, 24, (24, 16), 1, 2, 0, 1, 2),
    "dense unpadded": (2, 6, 5, 6, 7, (7, 6), 3, 1, 0, 1, 1),
}


# Many channels on small maps, where threads of the C++ provider share a weight's gradient by outputs.
SMALL_MAPS = {
    "dense 2x2": (6, 32, 2, 2, 70, (80, 48), 3, 1, 1, 1, 2),
    "dense 1x1 maps": (4, 64, 1, 1, 48, (48, 64), 3, 1, 1, 1, 2),
    "dense 5 at 3x2": (4, 48, 3, 2, 101, (101, 48), 5, 1, 2, 1, 2),
    "dense 5 at 2x1": (4, 32, 2, 1, 100, (100, 32), 5, 1, 2, 1, 2),
    "dense small stride 2": (3, 32, 5, 4, 130, (130, 40), 3, 2, 1, 1, 1),
    "dense small stride 3": (2, 64, 4, 5, 99, (99, 64), 2, 3, 1, 1, 2),
    "dense small unpadded": (4, 32, 4, 3, 100, (100, 32), 3, 1, 0, 1, 2),
    "dense small, more padding": (2, 32, 2, 3, 100, (100, 32), 2, 1, 2, 1, 1),
}


if triton.INTERPRETED:  # a thousand times slower
    SMALL_MAPS = {}
    FEW = ("pointwise odd", "pointwise 1x1 maps", "pointwise many views", "depthwise 3 stride 2", "dense 3", "stem")
    CASES = {name: CASES[name] for name in ("pointwise", "depthwise 3", "depthwise tiny maps", *FEW)}

# Cases with other Triton tiles in fp16 and bf16, or other numbers of images per tile.
TILES = {
    "many channels in": (2, 520, 3, 2, 72, (80, 528), 1, 1, 0, 1, 2),
    "many channels out": (2, 72, 3, 2, 264, (264, 72), 1, 1, 0, 1, 2),
    "large maps": (2, 8, 9, 15, 17, (17, 8), 1, 1, 0, 1, 2),
    "large maps, many channels": (2, 136, 9, 15, 144, (144, 136), 1, 1, 0, 1, 2),
    "images that fill no tile": (6, 16, 9, 5, 24, (24, 16), 1, 1, 0, 1, 2),
}


def some(*names: str) -> list[str]:
    """The cases of these names that exist."""
    return [name for name in names if name in CASES]


needs_cpp = pytest.mark.skipif(not cpp.load()[0], reason=cpp.load()[1])


provider = provider_of(conv_moments)


def make(case: str, act: str = "relu", deferred: bool = True, gated: bool = False, dtype=torch.float32) -> dict:
    """The operator's arguments, with values exactly representable in `dtype`."""
    images, channels, height, width, out_channels, full, kernel, stride, padding, groups, views = (
        CASES | TILES | SMALL_MAPS
    )[case]
    rows = {"scale": 1 + torch.rand(views, channels), "shift": torch.randn(views, channels)}
    return {
        "x": torch.randn(images, channels, height, width).to(memory_format=torch.channels_last).to(dtype),
        "scale": rows["scale"] if deferred else None,
        "shift": rows["shift"] if deferred else None,
        "act": act,
        "gate": torch.rand(images, channels) if gated else None,
        "weight": (torch.randn(*full, kernel, kernel) / (channels / groups * kernel**2) ** 0.5).to(dtype).float(),
        "main_grad": None,
        "out_channels": out_channels,
        "stride": stride,
        "padding": padding,
        "groups": groups,
        "views": views,
    }


def composed(x, scale, shift, act, gate, weight, main_grad, out_channels, stride, padding, groups, views):
    """The formulas in ordinary PyTorch operations, view by view."""
    outputs = []
    for view, part in enumerate(x.chunk(max(views, 1))):
        if scale is not None:
            row = view if len(scale) > 1 else 0
            part = scale[row, :, None, None] * part + shift[row, :, None, None]
        outputs.append(ACTIVATIONS[act](part))
    h = torch.cat(outputs)
    if gate is not None:
        h = h * gate[:, :, None, None]
    y = F.conv2d(h, weight[:out_channels, : x.shape[1] // groups], None, stride, padding, 1, groups)
    if not views:
        return y, y.new_empty(0, out_channels), y.new_empty(0, out_channels)
    moments = [(part.mean((0, 2, 3)), part.var((0, 2, 3), correction=0)) for part in y.chunk(views)]
    return y, *(torch.stack(moment) for moment in zip(*moments))


def cotangents(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Random cotangents; those of the moments are larger, as y has many more elements."""
    counts = outputs[0].numel() / max(outputs[1].numel(), 1)
    of_y, *of_moments = random_like(outputs)
    return of_y, *(counts**0.5 * of_moment for of_moment in of_moments)


def check(arguments: dict) -> None:
    """Check y and gradients of the active provider by the error rule, and the moments against those of the stored y."""
    (y, mean, variance), _ = harness.check(conv_moments, ("y",), arguments, cotangents)
    if arguments["views"]:
        of_view = y.double().unflatten(0, (arguments["views"], -1))
        exact_variance, exact_mean = torch.var_mean(of_view, (1, 3, 4), correction=0)
        deviation = of_view.sub(exact_mean[:, None, :, None, None]).abs().amax((1, 3, 4))
        unit = torch.finfo(mean.dtype).eps * (exact_mean.abs() + deviation)
        assert ((mean - exact_mean).abs() <= error_rule.UNITS * unit).all()
        assert ((variance - exact_variance).abs() <= error_rule.UNITS * unit * deviation).all()
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_native_body_equals_the_formulas(case, act, gated):
    arguments = double(make(case, act, gated=gated))
    got, used, grads = run(conv_moments, arguments, cotangents)
    want, _, want_grads = run(composed, arguments, used)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, want_grads)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_provider_satisfies_the_error_rule(provider, nan_filled, case, act, gated):
    check(make(case, act, gated=gated))


@pytest.mark.parametrize("case", CASES)
def test_error_rule_for_inputs_without_normalisation(provider, nan_filled, case):
    check(make(case, "identity", deferred=False))
    check(make(case, "relu", deferred=False, gated=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("dtype", NARROW)
def test_error_rule_in_narrow_dtypes(provider, nan_filled, case, gated, dtype):
    if case == "pointwise one row":
        pytest.skip("the deviation of a single value is only its rounding error")
    check(make(case, "hardswish", gated=gated, dtype=dtype))


@needs_cpp
@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("pointwise")])
def test_products_of_small_integers_in_bfloat16_are_exact(policy, nan_filled, case):
    """The specification of vdpbf16ps: exact products, summed in fp32. A sum of integers is exact in any order."""
    arguments = make(case, "relu", deferred=False, dtype=torch.bfloat16) | {"views": 0}
    for name in ("x", "weight"):
        arguments[name] = torch.randint_like(arguments[name], -4, 5)
    integers = double(arguments)
    results, used, grads = run(conv_moments, integers, lambda outputs: tuple(map(small_integers, outputs)))
    policy("cpp")
    got, _, got_grads = run(conv_moments, arguments, used)
    for want, ours in zip((results[0], *grads), (got[0], *got_grads)):
        assert torch.equal(ours, want.to(ours.dtype))


def small_integers(like: Tensor) -> Tensor:
    return torch.randint_like(like, -3, 4)


@pytest.mark.parametrize("case", TILES)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_error_rule_for_tensor_core_tiles(provider, nan_filled, case, gated):
    check(make(case, "hardswish", gated=gated, dtype=torch.bfloat16))


@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize(
    "case", some("pointwise many rows", "depthwise 3", "depthwise 3x3 maps", "depthwise one image", "dense 3")
)
def test_results_with_any_number_of_threads_are_correct_and_repeatable(provider, nan_filled, case, threads):
    arguments = make(case, gated=True)
    torch.set_num_threads(threads)
    check(arguments)
    first, used, first_grads = run(conv_moments, arguments)
    again, _, again_grads = run(conv_moments, arguments, used)
    if provider != "native":
        assert all(map(torch.equal, (*first, *first_grads), (*again, *again_grads)))


@pytest.mark.parametrize("case", ["pointwise", "depthwise 3", "dense 3"])
def test_single_row_of_scale_with_and_without_moments(provider, nan_filled, case):
    arguments = make(case)
    arguments |= {"scale": arguments["scale"][:1], "shift": arguments["shift"][:1]}
    check(arguments)
    check(arguments | {"views": 0})


@pytest.mark.parametrize("case", SMALL_MAPS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_rule_for_many_channels_on_small_maps(provider, nan_filled, case, threads, dtype):
    torch.set_num_threads(threads)
    arguments = make(case, "hardswish", gated=True, dtype=dtype)
    check(arguments)
    check(arguments | {"weight": arguments["weight"].contiguous(memory_format=torch.channels_last)})


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("case", [*CASES, *SMALL_MAPS])
def test_gradient_is_added_to_the_prefix_of_main_grad(provider, case, last):
    arguments = to_device(make(case))
    if last:
        arguments["weight"] = arguments["weight"].contiguous(memory_format=torch.channels_last)
    arguments["weight"].requires_grad_()
    y, mean, variance = conv_moments(*arguments.values())
    (whole,) = torch.autograd.grad((y.square().sum() + mean.sum() + variance.sum()), arguments["weight"])
    before = torch.randn_like(whole)
    arguments["main_grad"] = before.clone()
    y, mean, variance = conv_moments(*arguments.values())
    (y.square().sum() + mean.sum() + variance.sum()).backward()
    assert arguments["weight"].grad is None
    torch.testing.assert_close(arguments["main_grad"], before + whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())
    out, inputs = arguments["out_channels"], arguments["x"].shape[1] // arguments["groups"]
    assert arguments["main_grad"][out:].equal(before[out:])
    assert arguments["main_grad"][:, inputs:].equal(before[:, inputs:])


@pytest.mark.parametrize("case", some("pointwise", "pointwise many rows", "depthwise 3", "dense 3"))
def test_moments_are_exact_for_means_far_from_zero(provider, case):
    """|mean| / std = 1000, where the error of E[y^2] - E[y]^2 in fp32 exceeds the variance."""
    arguments = make(case, "identity", deferred=False)
    x, groups = arguments["x"], arguments["groups"]
    weight = torch.zeros_like(arguments["weight"])
    for channel in range(arguments["out_channels"]):  # only the centre tap: every output copies one input
        centre = weight.shape[2] // 2
        weight[channel, 0 if groups > 1 else channel % x.shape[1], centre, centre] = 1
    arguments |= {"weight": weight, "x": (x + 1000).contiguous(memory_format=torch.channels_last)}
    arguments["padding"] = 0
    _, mean, variance = conv_moments(*to_device(arguments).values())
    registry.set_policy("native")
    _, exact_mean, exact_variance = conv_moments(*double(arguments).values())
    torch.testing.assert_close(mean.cpu().double(), exact_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.cpu().double(), exact_variance, rtol=1e-4, atol=0)


@pytest.mark.parametrize("case", ["pointwise", "depthwise 3", "dense 3"])
def test_other_memory_formats_give_equal_results(provider, case):
    arguments = make(case)
    want, used, grads = run(conv_moments, arguments)
    arguments["x"] = arguments["x"].contiguous()
    arguments["weight"] = arguments["weight"].contiguous(memory_format=torch.channels_last)
    got, _, got_grads = run(conv_moments, arguments, used)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_grads, grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["pointwise", "depthwise 3", "dense 3"])
def test_gradient_of_weight_or_input_alone(provider, case):
    arguments = to_device(make(case))
    arguments["weight"].requires_grad_()
    y, _, _ = conv_moments(*arguments.values())
    y.sum().backward()
    assert arguments["weight"].grad is not None
    arguments["weight"] = arguments["weight"].detach()
    arguments["x"].requires_grad_()
    y, _, _ = conv_moments(*arguments.values())
    y.sum().backward()
    assert arguments["x"].grad is not None


@pytest.mark.parametrize("case", ["pointwise", "many channels out", "depthwise 3"])
def test_one_launch_adds_up_all_partial_sums_of_the_backward(provider, case):
    if provider != "triton":
        pytest.skip("only triton launches kernels")
    arguments = to_device(make(case, dtype=torch.bfloat16))
    for name in differentiable(arguments):
        arguments[name].requires_grad_()
    y = conv_moments(*arguments.values())[0]
    launched = []
    with triton.kernels("launch").observed(lambda kernel, *_: launched.append(kernel.fn.__name__)):
        y.sum().backward()
    assert launched[-1] == "sums_kernel"
    assert all("gradient" in name or "backward" in name for name in launched[:-1])


@pytest.mark.parametrize("case", ["pointwise", "depthwise 3", "dense 3"])
def test_opcheck(provider, case):
    arguments = to_device(make(case, gated=True))
    arguments["main_grad"] = torch.zeros_like(arguments["weight"])
    opcheck(torch.ops.dspnet.conv_moments.default, tuple(arguments.values()))
    for name in differentiable(arguments):
        arguments[name].requires_grad_()
    opcheck(torch.ops.dspnet.conv_moments.default, tuple((arguments | {"main_grad": None}).values()))


REFUSED = {
    "x of three dimensions": lambda a: {"x": a["x"][0]},
    "integers": lambda a: {"x": a["x"].int()},
    "an unknown activation": lambda a: {"act": "mish"},
    "scale without shift": lambda a: {"shift": None},
    "scale of other channels": lambda a: {"scale": a["scale"][:, 1:]},
    "rows that are no views": lambda a: {"scale": a["scale"].repeat(2, 1), "shift": a["shift"].repeat(2, 1)},
    "views that do not divide the batch": lambda a: {"views": 3},
    "negative views": lambda a: {"views": -1},
    "a gate of other images": lambda a: {"gate": a["gate"][1:]},
    "more output channels than the weight": lambda a: {"out_channels": 41},
    "no output channels": lambda a: {"out_channels": 0},
    "more input channels than the weight": lambda a: {"weight": a["weight"][:, :3]},
    "groups that are neither 1 nor depthwise": lambda a: {"groups": 2},
    "no channels in no groups": lambda a: (
        {name: a[name][:, :0] for name in ("x", "scale", "shift", "gate")} | {"out_channels": 0, "groups": 0}
    ),
    "an oblong kernel": lambda a: {"weight": a["weight"].expand(-1, -1, 1, 2)},
    "a kernel larger than the image": lambda a: {"weight": a["weight"].expand(-1, -1, 9, 9)},
    "no stride": lambda a: {"stride": 0},
    "negative padding": lambda a: {"padding": -1},
    "no positions but padding": lambda a: {"x": a["x"][:, :, :, :0], "padding": 3},
    "no images": lambda a: {"x": a["x"][:0], "gate": a["gate"][:0]},
    "a main_grad of another shape": lambda a: {"main_grad": a["weight"][1:]},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_invalid_arguments_are_rejected(provider, reason):
    arguments = to_device(make("pointwise", gated=True))
    arguments |= REFUSED[reason](arguments)
    with pytest.raises((RuntimeError, InputError)):  # InputError: the chosen provider does not support the dtype
        conv_moments(*arguments.values())


@pytest.mark.parametrize("name", ["native", pytest.param("cpp", marks=needs_cpp)])
def test_main_grad_that_overlaps_itself_is_rejected(policy, name):
    policy(name)
    arguments = make("pointwise")
    arguments["weight"].requires_grad_()
    arguments["main_grad"] = torch.zeros(1).expand_as(arguments["weight"])
    y, _, _ = conv_moments(*arguments.values())
    with pytest.raises(RuntimeError, match="single memory location"):
        y.sum().backward()


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2"], indirect=True)
def test_every_build_of_the_library(run_python, capability):
    """The library's builds for older processors, by the error rule."""
    check_build(
        run_python,
        capability,
        "test_conv_moments",
        "for case in t.CASES:\n"
        "    t.check(t.make(case, 'hardswish', gated=True))\n"
        "    if case != 'pointwise one row':\n"
        "        t.check(t.make(case, 'relu', dtype=torch.bfloat16))\n",
    )


@pytest.mark.parametrize("capability", ["AVX512"], indirect=True)
def test_products_without_avx512_bf16_satisfy_the_error_rule(run_python, capability, monkeypatch):
    monkeypatch.setenv("DSPNET_AVX512_BF16", "0")
    check_build(
        run_python,
        capability,
        "test_conv_moments",
        "for case in t.CASES:\n"
        "    if case.startswith('pointwise') and case != 'pointwise one row':\n"
        "        t.check(t.make(case, 'relu', dtype=torch.bfloat16))\n",
    )
