"""Compiles an operator's Triton kernels for a GPU, without a GPU.

    python tests/kernels/ahead_of_time.py conv_moments 90

calls the operator's launchers with meta tensors of the shapes in benchmarks/ops/layers.py, and compiles each distinct
launch for compute capability 9.0; with a further argument N only every N-th launch of each kernel. Prints a line of
JSON for each: registers, stack (spilled registers), shared memory, and for tiles of bf16 and f32 the bytes of a
thread's loads.
"""

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from dspnet_fast.kernels import ahead, launch
from dspnet_fast.kernels.ahead import Launch
from torch import Tensor

from benchmarks.ops.layers import IMAGES, MOBILENET, RESNET, VIEWS, Conv
from dspnet_fast.ops import triton as provider

DTYPES = (torch.bfloat16, torch.float32)
OTHER_ACTS = ("relu6", "silu", "gelu", "gelu_tanh")  # of traced networks
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A meta tensor."""
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor.to(memory_format=torch.channels_last) if len(shape) == 4 else tensor


def layer_input(layer: Conv, dtype: torch.dtype) -> tuple[Any, ...]:
    """x, scale, shift, act, gate of a layer's input."""
    rows = [None if layer.act is None else empty(VIEWS, layer.channels) for _ in range(2)]
    gate = empty(IMAGES, layer.channels) if layer.gated else None
    return empty(IMAGES, layer.channels, layer.size, layer.size, dtype=dtype), *rows, layer.act or "identity", gate


def call_conv_moments(layer: Conv, dtype: torch.dtype) -> None:
    """Forward, with and without moments, and backward, for depthwise layers with and without a pooled output."""
    kernels = provider.kernels("conv_moments")
    weight = empty(*layer.full, layer.kernel, layer.kernel)
    geometry = layer.stride, layer.kernel // 2, layer.groups
    for views in (VIEWS, 0) if layer.channels == 64 else (VIEWS,):  # one layer also without moments, to compare
        kernels.conv_moments(*layer_input(layer, dtype), weight, layer.out_channels, *geometry, views)
    y = empty(IMAGES, layer.out_channels, layer.out_size, layer.out_size, dtype=dtype)
    moments = [empty(VIEWS, layer.out_channels) for _ in range(3)]
    pooled = (None, None, None, "identity"), (empty(*y.shape[:2]), *moments[:2], layer.act)
    for of_pooled in pooled if layer.groups > 1 else pooled[:1]:
        kernels.conv_moments_backward(
            y,
            *moments[:2],
            *layer_input(layer, dtype),
            weight,
            weight,
            y,
            moments[2],
            *geometry,
            True,
            True,
            *of_pooled,
        )


def call_conv_norm(layer: Conv, dtype: torch.dtype) -> None:
    """Moments merged into scale and shift, with and without weight and bias. The rest is that of conv_moments."""
    kernels, affine = provider.kernels("moments"), empty(layer.full[0])
    rows = kernels.moments_of_rows(empty(IMAGES * layer.out_size**2, layer.out_channels, dtype=dtype), VIEWS)
    for vector in (affine, None):
        kernels.merge_moments(rows, kernels.Norm(vector, vector, 1e-5))


def call_norm_act(layer: Conv, dtype: torch.dtype) -> None:
    """With a plain residual, with a residual that has a deferred normalisation, and without a residual."""
    kernels = provider.kernels("norm_act")
    x, *rest = layer_input(layer, dtype)
    residual, rows = empty(*x.shape, dtype=dtype), [empty(VIEWS, layer.channels) for _ in range(2)]
    for other in ((residual, None, None), (residual, *rows), (None, None, None)):
        kernels.norm_act(x, *rest, *other)
        kernels.norm_act_backward(x, x, *rest, *other, other[0] is not None)


def call_norm_act_pool(layer: Conv, dtype: torch.dtype) -> None:
    """Forward with and without the means for the backward, and backward."""
    kernels = provider.kernels("norm_act_pool")
    x, scale, shift, act, _ = layer_input(layer, dtype)
    for gradient_means in (False, True):
        means = kernels.norm_act_pool(x, scale, shift, act, gradient_means)
    kernels.norm_act_pool_backward(means[0], x, scale, shift, act, *means[1:], True)


def call_scale_shift(layer: Conv, dtype: torch.dtype) -> None:
    """Forward and backward, with a prefix of a layer's weight and bias."""
    kernels = provider.kernels("scale_shift")
    moments, affine = empty(VIEWS, layer.out_channels), empty(layer.full[0])
    kernels.scale_shift(moments, moments, affine, affine, 1e-5)
    kernels.scale_shift_backward(moments, moments, moments, moments, affine, affine, affine, affine, 1e-5)


def call_slim_batch_norm(layer: Conv, dtype: torch.dtype) -> None:
    """Forward and backward."""
    kernels = provider.kernels("slim_batch_norm")
    x, affine = layer_input(layer, dtype)[0], empty(layer.channels)
    _, mean, variance = kernels.slim_batch_norm(x, affine, affine, 1e-5, VIEWS)
    kernels.slim_batch_norm_backward(x, mean, variance, x, affine, mean, variance, 1e-5)


def call_slim_linear(layer: Conv, dtype: torch.dtype) -> None:
    """Forward and backward, with a prefix of a weight."""
    kernels = provider.kernels("slim_linear")
    x, weight = empty(IMAGES, layer.channels, dtype=dtype), empty(layer.full[0], layer.channels + 8, dtype=dtype)
    y = kernels.slim_linear(x, weight, None, layer.out_channels)
    kernels.slim_linear_backward(y, x, weight, None, True, True, True)


CALLS = {name.removeprefix("call_"): function for name, function in globals().items() if name.startswith("call_")}


def layers() -> list[Conv]:
    """The layers of our networks, and one pointwise and one depthwise layer with each activation of others."""
    own = [*(MOBILENET | RESNET).values()]
    pointwise = next(layer for layer in own if layer.act == "hardswish" and layer.groups == 1)
    depthwise = next(layer for layer in own if layer.act == "hardswish" and layer.groups > 1)
    return [*own, *(replace(layer, act=act) for act in OTHER_ACTS for layer in (pointwise, depthwise))]


def launches(operator: str) -> list[Launch]:
    """All distinct launches of an operator."""
    found: dict[Launch, None] = {}
    with launch.observed(lambda *observed: found.setdefault(Launch.of(*observed))):
        for layer in layers():
            for dtype in DTYPES:
                CALLS[operator](layer, dtype)
    return list(found)


def usage(cubin: bytes) -> dict[str, int]:
    """The registers and the bytes of stack, local and shared memory of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        result = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", result.stdout)}


def load_widths(ttgir: str, dtype: str, threads: int) -> list[tuple[int, int]]:
    """For each load of a tile of a dtype, such as bf16: bytes that a thread reads at once, and that the tile allows."""
    blocked = r"^(#\w+) = #ttg\.blocked<\{sizePerThread = \[\d+, (\d+)\].* order = \[1, 0\]"
    layouts = dict(re.findall(blocked, ttgir, re.M))
    load = r"(?:tt\.load|async_copy_global_to_local)[^\n]*: tensor<(\d+)x(\d+)x!tt\.ptr<"
    size = int(dtype[-2:]) // 8
    return sorted(
        (int(layouts.get(layout, 1)) * size, min(16, max(int(rows) * int(columns) // threads, 1) * size))
        for rows, columns, layout in set(re.findall(rf"{load}{dtype}>, (#\w+)>", ttgir))
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("operator")
    parser.add_argument("capability", type=int)
    parser.add_argument("every", type=int, nargs="?", default=1)
    options = parser.parse_args()
    by_kernel: dict[str, list[Launch]] = {}
    for call in launches(options.operator):
        by_kernel.setdefault(call.kernel, []).append(call)
    ahead.set_target(options.capability)
    for distinct in (chosen for found in by_kernel.values() for chosen in found[:: options.every]):
        compiled, tile = distinct.compile(), dict(distinct.options)
        line = {"kernel": distinct.kernel.split(":")[1], "sm": options.capability, "triton": triton.__version__}
        threads = 32 * tile["num_warps"]
        widths = {dtype: load_widths(compiled.asm["ttgir"], dtype, threads) for dtype in ("bf16", "f32")}
        line["shared"] = compiled.metadata.shared
        print(json.dumps(line | tile | usage(compiled.asm["cubin"]) | widths), flush=True)


if __name__ == "__main__":
    main()
