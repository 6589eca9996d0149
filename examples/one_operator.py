"""Use one fused operator alone: a convolution that normalises its input while loading and returns its output's moments.

    python examples/one_operator.py

conv_moments computes, in one pass over x, what plain PyTorch computes in three (scale and shift, activation,
convolution) plus one for the statistics of the following batch normalisation.
"""

import torch
import torch.nn.functional as F
from torch.utils import benchmark

from dspnet_fast.ops import conv_moments, registry

IMAGES, CHANNELS, OUT, SIZE, VIEWS = 32, 96, 24, 24, 2


def fused(x, scale, shift, weight):
    """y and its mean and variance per view, [VIEWS, OUT]."""
    return conv_moments(x, scale, shift, "hardswish", None, weight, None, OUT, 1, 0, 1, VIEWS)


def plain(x, scale, shift, weight):
    """The same by separate PyTorch operators."""
    scale, shift = (rows.repeat_interleave(IMAGES // VIEWS, 0)[:, :, None, None] for rows in (scale, shift))
    h = F.hardswish(x * scale + shift)
    y = F.conv2d(h, weight)
    variance, mean = torch.var_mean(y.unflatten(0, (VIEWS, -1)), (1, 3, 4), correction=0)
    return y, mean, variance


def main() -> None:
    """Compare results, gradients and times."""
    registry.fast_kernels()
    torch.manual_seed(0)
    x = torch.randn(IMAGES, CHANNELS, SIZE, SIZE).to(memory_format=torch.channels_last).requires_grad_()
    scale, shift = (torch.rand(VIEWS, CHANNELS, requires_grad=True) for _ in range(2))
    weight = torch.randn(OUT, CHANNELS, 1, 1, requires_grad=True)
    inputs = x, scale, shift, weight

    ours, expected = fused(*inputs), plain(*inputs)
    for name, a, b in zip(("y", "mean", "variance"), ours, expected, strict=True):
        print(f"{name:9} {list(a.shape)!s:18} largest difference {(a - b).abs().max():.1e}")
    gradients = [torch.autograd.grad(sum(t.square().sum() for t in outputs), inputs) for outputs in (ours, expected)]
    for name, a, b in zip(("x", "scale", "shift", "weight"), *gradients, strict=True):
        print(f"gradient of {name:7} relative difference {((a - b).norm() / b.norm()):.1e}")

    provider = registry.serving("cpu")["conv_moments"]
    for name, function in (("plain PyTorch", plain), (f"conv_moments ({provider})", fused)):
        timer = benchmark.Timer("f(*inputs)", globals={"f": function, "inputs": [t.detach() for t in inputs]})
        print(f"{name:22} {timer.blocked_autorange(min_run_time=0.5).median * 1e3:.2f} ms forward")


if __name__ == "__main__":
    main()
