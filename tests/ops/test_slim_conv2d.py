"""slim_conv2d: every provider equals a convolution with the sliced weight; rejected arguments."""

import pytest
import torch
import torch.nn.functional as F
from harness import DTYPES, check, device, double, provider_of, run, to_device
from torch import Tensor
from torch.library import opcheck

from dspnet_fast.errors import InputError
from dspnet_fast.ops import cpp, slim_conv2d

# (shape of x, shape of the full weight, channels out, stride, padding, dilation, groups)
CASES = {
    "dense 3": ((4, 8, 9, 7), (20, 12, 3, 3), 13, (1, 1), (1, 1), (1, 1), 1),
    "dense 3 stride 2": ((4, 8, 9, 7), (20, 12, 3, 3), 13, (2, 2), (1, 1), (1, 1), 1),
    "stem": ((2, 3, 17, 16), (16, 3, 3, 3), 16, (2, 2), (1, 1), (1, 1), 1),
    "shortcut": ((4, 16, 8, 9), (24, 16, 1, 1), 24, (2, 2), (0, 0), (1, 1), 1),
    "unpadded": ((2, 6, 5, 6), (7, 6, 3, 3), 7, (1, 1), (0, 0), (1, 1), 1),
    "pointwise": ((4, 16, 8, 9), (40, 24, 1, 1), 24, (1, 1), (0, 0), (1, 1), 1),
    "depthwise": ((4, 13, 8, 9), (20, 1, 3, 3), 13, (1, 1), (1, 1), (1, 1), 13),
    "depthwise stride 2": ((4, 13, 8, 9), (20, 1, 5, 5), 13, (2, 2), (2, 2), (1, 1), 13),
}
# Supported by the native body only.
OTHER_CASES = {
    "oblong": ((2, 6, 8, 9), (12, 8, 3, 2), 9, (2, 1), (0, 1), (1, 1), 1),
    "dilated": ((2, 6, 8, 9), (12, 8, 3, 3), 9, (1, 1), (2, 2), (2, 2), 1),
    "groups": ((2, 6, 8, 9), (12, 4, 3, 3), 9, (1, 1), (1, 1), (1, 1), 3),
}


provider = provider_of(slim_conv2d)


def make(case: str, biased: bool = True, dtype: torch.dtype = torch.float32) -> dict:
    """The operator's arguments."""
    shape, full, out_channels, *geometry = (CASES | OTHER_CASES)[case]
    return {
        "x": torch.randn(shape).to(memory_format=torch.channels_last).to(dtype),
        "weight": torch.randn(full).to(dtype),
        "bias": torch.randn(out_channels).to(dtype) if biased else None,
        "main_grad": None,
        "out_channels": out_channels,
        **dict(zip(("stride", "padding", "dilation", "groups"), geometry)),
    }


def composed(x, weight, bias, main_grad, out_channels, stride, padding, dilation, groups):
    """PyTorch's convolution with the sliced weight; autograd computes the gradient of the full weight."""
    prefix = weight[:out_channels, : x.shape[1] // groups]
    return F.conv2d(x, prefix, bias, stride, padding, dilation, groups)


@pytest.mark.parametrize("case", CASES | OTHER_CASES)
@pytest.mark.parametrize("biased", [True, False], ids=["", "no bias"])
def test_native_body_equals_a_sliced_convolution(case, biased):
    arguments = double(make(case, biased))
    got, cotangent, grads = run(slim_conv2d, arguments)
    want, _, want_grads = run(composed, arguments, cotangent)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, want_grads)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("biased", [True, False], ids=["", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_provider_satisfies_the_error_rule(provider, nan_filled, case, biased, dtype):
    check(slim_conv2d, ("y",), make(case, biased, dtype))


@pytest.mark.skipif(not cpp.load()[0], reason=cpp.load()[1])
@pytest.mark.parametrize("case", OTHER_CASES)
def test_unsupported_convolutions_use_the_native_body(policy, case):
    arguments = make(case)
    want, cotangent, grads = run(slim_conv2d, arguments)
    policy("auto")
    got, _, got_grads = run(slim_conv2d, arguments, cotangent)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_grads, grads)
    policy("cpp")
    with pytest.raises(InputError):
        slim_conv2d(*arguments.values())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_is_added_to_the_prefix_of_main_grad(provider, case, dtype):
    arguments = make(case, dtype=dtype)
    _, (cotangent,), (_, whole, _) = run(slim_conv2d, arguments)
    before = torch.randn_like(whole)
    arguments = to_device(arguments | {"main_grad": before.clone()})
    arguments["weight"].requires_grad_()
    slim_conv2d(*arguments.values()).backward(cotangent.to(device()))
    assert arguments["weight"].grad is None
    rounding = torch.finfo(dtype).eps * whole.abs().max().item()
    main_grad = arguments["main_grad"].cpu()
    torch.testing.assert_close(main_grad, before + whole, rtol=torch.finfo(dtype).eps, atol=4 * rounding)
    out, inputs = arguments["out_channels"], arguments["x"].shape[1] // arguments["groups"]
    assert main_grad[out:].equal(before[out:])
    assert main_grad[:, inputs:].equal(before[:, inputs:])


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_single_input_requires_a_gradient(provider, name):
    arguments = to_device(make("dense 3"))
    arguments[name].requires_grad_()
    slim_conv2d(*arguments.values()).sum().backward()
    assert arguments[name].grad is not None


@pytest.mark.parametrize("biased", [True, False], ids=["", "no bias"])
def test_opcheck(provider, biased):
    arguments = to_device(make("dense 3", biased))
    opcheck(
        torch.ops.dspnet.slim_conv2d.default,
        tuple((arguments | {"main_grad": torch.zeros_like(arguments["weight"])}).values()),
    )
    for value in arguments.values():
        if isinstance(value, Tensor):
            value.requires_grad_()
    opcheck(torch.ops.dspnet.slim_conv2d.default, tuple(arguments.values()))


REFUSED = {
    "x of three dimensions": lambda a: {"x": a["x"][0]},
    "a weight of two dimensions": lambda a: {"weight": a["weight"][:, :, 0, 0]},
    "more output channels than the weight": lambda a: {"out_channels": 21},
    "no output channels": lambda a: {"out_channels": 0},
    "more input channels than the weight": lambda a: {"weight": a["weight"][:, :3]},
    "no groups": lambda a: {"groups": 0},
    "a bias of other channels": lambda a: {"bias": a["bias"][:3]},
    "a bias of one": lambda a: {"bias": a["bias"][:1]},
    "a bias of another dtype": lambda a: {"bias": a["bias"].double()},
    "a kernel larger than the image": lambda a: {"x": a["x"][:, :, :1, :1], "padding": (0, 0)},
    "no stride": lambda a: {"stride": (0, 0)},
    "negative padding": lambda a: {"padding": (-1, -1)},
    "a main_grad of another shape": lambda a: {"main_grad": a["weight"][1:]},
    "a main_grad of another dtype": lambda a: {"main_grad": a["weight"].double()},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_invalid_arguments_are_rejected(provider, reason):
    arguments = to_device(make("dense 3"))
    arguments |= REFUSED[reason](arguments)
    with pytest.raises((RuntimeError, InputError)):
        slim_conv2d(*arguments.values())
