"""Products of bf16 activations in pointwise and dense convolutions, bit by bit, against a model of the arithmetic.

With AVX512_BF16 the arithmetic is vdpbf16ps. A lane of the sum takes two products in turn, the second pair of numbers
first:

    sum = fma(a[0], b[0], fma(a[1], b[1], sum))

Each fma rounds to nearest even, whatever the mode of the process; subnormal operands and results are zero. Otherwise
the arithmetic is fp32: sum = fma(a, b, sum), one product after another. The product of two bf16 numbers is exact in
fp32, so neither rounds it, and both compute the same except for the order of the additions and subnormal numbers.
"""

import os
import platform

import pytest
import torch
from harness import check_build
from torch import Tensor
from torch.nn.functional import pad

from dspnet_fast.ops import cpp


def problem() -> str:
    """Why no product can be compared with the model, or an empty text."""
    loaded, reason = cpp.load()
    if loaded and torch.ops.dspnet_cpp.cpu_capability() == "DEFAULT" and platform.machine() == "x86_64":
        return "without fma, the compiled library rounds products before it adds them"
    return reason


SMALLEST_NORMAL = 2.0**-126


def uses_vdpbf16ps() -> bool:
    """Whether convolutions of this process multiply by the instruction."""
    return (
        torch.ops.dspnet_cpp.cpu_capability() == "AVX512"
        and torch.cpu._is_avx512_bf16_supported()
        and os.environ.get("DSPNET_AVX512_BF16") != "0"
    )


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c rounded once, for bf16 numbers a and b: float64 holds all bits of the sum that decide the rounding."""
    return (a.double() * b.double() + c.double()).float()


def flushed(x: Tensor) -> Tensor:
    """x with zeros of the same sign for subnormal numbers."""
    return torch.where(x.abs() < SMALLEST_NORMAL, torch.copysign(torch.zeros_like(x), x), x)


def vdpbf16ps(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The instruction: adds the products of pairs, [..., 2], to a sum."""
    total, a, b = flushed(total), flushed(a), flushed(b)
    for i in (1, 0):
        total = flushed(fma(a[..., i], b[..., i], total))
    return total


def product(a: Tensor, b: Tensor, paired: bool) -> Tensor:
    """a b^T, [i, k] and [j, k], summed over k by the instruction or by fp32's fma."""
    a, b = a.float()[:, None], b.float()[None]
    total = torch.zeros(torch.broadcast_shapes(a.shape, b.shape)[:2])
    if paired:
        a, b = (pad(t, (0, t.shape[-1] % 2)) for t in (a, b))
        for k in range(0, a.shape[-1], 2):
            total = vdpbf16ps(total, a[..., k : k + 2], b[..., k : k + 2])
    else:
        for k in range(a.shape[-1]):
            total = fma(a[..., k], b[..., k], total)
    return total


def bits(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


# (the sum before, a, b, the sum after)
STEPS = {
    "the second product is added first": (1, (2.0**-30, -1), (1, 1), 2.0**-30),
    "the sum is rounded between the products": (2.0**24, (1, 1), (1, 1), 2.0**24),
    "a tie is rounded to even": (2.0**24 + 2, (1, 0), (1, 0), 2.0**24 + 4),
    "a subnormal sum is zero": (2.0**-127, (0, 0), (0, 0), 0),
    "a subnormal factor is zero": (0, (2.0**-127, 0), (2.0**10, 0), 0),
    "a subnormal first sum is zero": (0, (2.0**-63, 2.0**-64), (2.0**-63, 2.0**-63), SMALLEST_NORMAL),
    "a subnormal product is added exactly": (0, (2.0**-64, 2.0**-63), (2.0**-63, 2.0**-63), 1.5 * SMALLEST_NORMAL),
    "a subnormal difference is zero": (1.5 * SMALLEST_NORMAL, (-(2.0**-63), 0), (2.0**-63, 0), 0),
    "an infinity stays": (float("inf"), (1, 1), (1, 1), float("inf")),
}


@pytest.mark.parametrize("step", STEPS)
def test_model_follows_the_specification_of_the_instruction(step):
    total, a, b, want = STEPS[step]
    assert torch.equal(vdpbf16ps(bits(total), bits(*a)[None], bits(*b)[None]), bits(want))


# Exponents of the numbers. Sums of the tiny ones are at the limit of subnormal numbers.
RANGES = {"near one": (-2, 2), "wide": (-30, 30), "tiny": (-66, -60), "vanishing": (-130, -60)}
# (positions, input channels, output channels): one block of rows, and sums without partial sums
SIZES = {"whole": (48, 32, 64), "odd": (35, 13, 37), "one": (1, 1, 1), "deep": (12, 250, 40), "panels": (40, 90, 200)}


def numbers(exponents: tuple[int, int], *sizes: int) -> Tensor:
    """bf16 numbers of random exponents."""
    return torch.randn(sizes).mul(torch.exp2(torch.randint(*exponents, sizes).float())).bfloat16()


def check(size: str, exponents: tuple[int, int]) -> None:
    """Check y and the gradients of x and the weight of a pointwise convolution."""
    positions, channels, out_channels = SIZES[size]
    x, weight = numbers(exponents, positions, channels), numbers(exponents, out_channels, channels)
    grad = numbers(exponents, positions, out_channels)

    y, dx, dw = convolve(*(t[:, :, None, None] for t in (x, weight, grad)), stride=1, padding=0)
    paired = uses_vdpbf16ps()
    compare("y", y[..., 0, 0], product(x, weight, paired).bfloat16())
    compare("dx", dx[..., 0, 0], product(grad, weight.T, paired).bfloat16())
    compare("dW", dw[..., 0, 0], product(grad.T, x.T, paired))


def convolve(x: Tensor, weight: Tensor, grad: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """The compiled operators' y and gradients of x and the weight."""
    ops, geometry = torch.ops.dspnet_cpp, (stride, padding, 1)
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    of_moments = torch.zeros(0, len(weight))
    before = x, None, None, "identity", None, weight.float()
    y, mean, _ = ops.conv_moments(*before, len(weight), *geometry, 0)
    dx, *_, dw = ops.conv_moments_backward(
        grad, of_moments, of_moments, *before, None, y, mean, *geometry, True, True, None, None, None, "identity"
    )
    return y, dx, dw


# (input channels, output channels, height, width, stride): two images, each of which is a block of its own
DENSE_SIZES = {
    "even": (16, 24, 5, 6, 1),
    "odd rows": (10, 20, 4, 5, 1),
    "stride": (16, 24, 7, 10, 2),
    "one pixel": (2, 4, 1, 1, 1),
    "odd channels": (7, 12, 5, 5, 1),
}


def patches(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """The pixels [images, rows, columns, ky, kx, channels] that every output position of a convolution reads."""
    windows = pad(x.float(), [padding] * 4).unfold(2, kernel, stride).unfold(3, kernel, stride)
    return windows.permute(0, 2, 3, 4, 5, 1)


def check_dense(size: str, exponents: tuple[int, int]) -> None:
    """Check y and the gradients of x (with stride 1) and of the weight of a 3 x 3 convolution.

    y sums over ky, kx and input channels. A gradient of x sums over ky, kx from the last to the first and output
    channels. A gradient of the weight sums over the rows of an image, whose pixels are paired, and then over images.
    """
    channels, out_channels, height, width, stride = DENSE_SIZES[size]
    x, weight = numbers(exponents, 2, channels, height, width), numbers(exponents, out_channels, channels, 3, 3)
    read = patches(x, 3, stride, 1)
    grad = numbers(exponents, 2, out_channels, *read.shape[1:3])
    y, dx, dw = convolve(x, weight, grad, stride, padding=1)
    paired = uses_vdpbf16ps() and channels % 2 == 0

    wanted = product(read.flatten(3).flatten(0, 2), weight.permute(0, 2, 3, 1).flatten(1), paired)
    compare("y", y.permute(0, 2, 3, 1).flatten(0, 2), wanted.bfloat16())
    if stride == 1:
        of_dx = patches(grad, 3, 1, 1).flip(3).flatten(3).flatten(0, 2)
        wanted = product(of_dx, weight.permute(1, 2, 3, 0).flip(2).flatten(1), paired)
        compare("dx", dx.permute(0, 2, 3, 1).flatten(0, 2), wanted.bfloat16())
    of_grad = pad(grad, (0, grad.shape[3] % 2)).flatten(2)  # [images, output channels, positions]
    of_read = pad(read.permute(0, 3, 4, 5, 1, 2), (0, grad.shape[3] % 2)).flatten(4).flatten(1, 3)
    first, second = (product(a, b, paired) for a, b in zip(of_grad, of_read, strict=True))
    compare("dW", dw.permute(0, 2, 3, 1).flatten(1), first + second)


def compare(name: str, got: Tensor, want: Tensor) -> None:
    """Require equal numbers; zeros may differ in sign."""
    different = (got != want).nonzero()
    assert not len(different), f"{name}: {len(different)} of {got.numel()} differ, the first at {different[0].tolist()}"


@pytest.mark.skipif(problem() != "", reason=problem())
@pytest.mark.parametrize("exponents", RANGES)
@pytest.mark.parametrize("size", SIZES)
def test_products_equal_the_model(nan_filled, size, exponents):
    torch.set_num_threads(1)
    check(size, RANGES[exponents])


@pytest.mark.skipif(problem() != "", reason=problem())
@pytest.mark.parametrize("exponents", RANGES)
@pytest.mark.parametrize("size", DENSE_SIZES)
def test_dense_products_equal_the_model(nan_filled, size, exponents):
    torch.set_num_threads(1)
    check_dense(size, RANGES[exponents])


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"], indirect=True)
def test_products_without_the_instruction_equal_the_model_of_fp32(run_python, capability, monkeypatch):
    monkeypatch.setenv("DSPNET_AVX512_BF16", "0")
    check_build(
        run_python,
        capability,
        "test_bfloat16_products",
        "assert not t.uses_vdpbf16ps()\n"
        "torch.set_num_threads(1)\n"
        "for exponents in t.RANGES.values():\n"
        "    for size in t.SIZES:\n"
        "        t.check(size, exponents)\n"
        "    for size in t.DENSE_SIZES:\n"
        "        t.check_dense(size, exponents)\n",
    )
