"""Kernels with one fault each that Triton's interpreter does not detect. Prints the strict one's messages as JSON.

TRITON_INTERPRET=1 python tests/kernels/faulty.py
"""

import json

import torch
import triton
import triton.language as tl

from tests.kernels import strict_interpreter


@triton.jit
def copy_kernel(x, y, size, stride, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets, mask=offsets < size, other=0.0), mask=offsets < size)


@triton.jit
def write_twice_kernel(x, y, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK) // 2, tl.load(x + tl.arange(0, BLOCK)))


@triton.jit
def read_back_kernel(x, y, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)))
    tl.store(x + tl.arange(0, BLOCK), tl.load(y + tl.arange(0, BLOCK)))


@triton.jit
def overflow_kernel(x, y, stride, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK) * stride
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + offsets, mask=offsets < 1, other=0.0))


@triton.jit
def product_kernel(x, y, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    rows, depth = tl.arange(0, BLOCK), tl.arange(0, DEPTH)
    values = tl.load(x + rows[:, None] * DEPTH + depth[None, :])
    tl.store(y + rows[:, None] * BLOCK + rows[None, :], tl.dot(values, tl.trans(values)).to(y.dtype.element_ty))


def main() -> None:
    strict_interpreter.install()
    x, y = torch.randn(64), torch.empty(256)
    cases = {
        "correct": lambda: copy_kernel[(3,)](x, y, 48, 16, BLOCK=16),
        "reads outside": lambda: copy_kernel[(3,)](x[:40], y, 48, 16, BLOCK=16),
        "writes outside": lambda: copy_kernel[(3,)](x, y[:40], 48, 16, BLOCK=16),
        "write conflict": lambda: copy_kernel[(3,)](x, y, 48, 15, BLOCK=16),
        "read conflict": lambda: copy_kernel[(3,)](x, x[16:], 48, 16, BLOCK=16),
        "writes twice": lambda: write_twice_kernel[(1,)](x, y, BLOCK=16),
        "reads back": lambda: read_back_kernel[(1,)](x, y, BLOCK=16),
        "overflows": lambda: overflow_kernel[(1,)](x, y, 1 << 28, BLOCK=16),
        "small product": lambda: product_kernel[(1,)](x, y, BLOCK=16, DEPTH=4),
    }
    messages = {}
    for name, launch in cases.items():
        try:
            launch()
            messages[name] = ""
        except Exception as error:
            messages[name] = str(error)
    values = torch.randn(16, 16)
    for dtype in (torch.float16, torch.bfloat16):
        narrow, product = values.to(dtype), torch.empty(16, 16, dtype=dtype)
        product_kernel[(1,)](narrow, product, BLOCK=16, DEPTH=16)
        assert torch.equal(product, (narrow.float() @ narrow.float().t()).to(dtype)), dtype
    print(json.dumps(messages))


if __name__ == "__main__":
    main()
