"""Descriptions of tensors for fuzzing.py, and tensors made from them between guard pages."""

import ctypes
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

MOST = 1 << 22  # elements of a tensor
VAST = 1 << 41  # elements at one address, more than memory holds
DTYPES = ("float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "int64", "int32", "uint8", "bool", "complex64")
# States of tensors other than numbers in memory.
LACKING = ("emptied", "shrunk")  # the storage was resized to less than the tensor
STATES = (*LACKING, "requires grad", "meta", "sparse", "sparse rows", "mkldnn", "negative", "conjugate", "zero")


@dataclass(frozen=True)
class Made:
    """Description of a tensor. Its first element is `offset` elements after the start of its memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str = "float32"
    offset: int = 0
    state: str = ""
    at_end: bool = True  # it ends at the guard page after it; otherwise it begins at the one before it

    def span(self) -> int:
        """Number of elements of its memory."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))
        return self.offset + last + 1 if all(self.shape) else self.offset

    def fits(self) -> bool:
        return self.span() <= MOST

    def make(self, written: bool) -> Tensor:
        dtype = getattr(torch, self.dtype)
        if self.state == "meta":
            return torch.empty(self.span(), dtype=dtype, device="meta").as_strided(
                self.shape, self.strides, self.offset
            )
        numbers = (torch.randn(self.span()) * 3).to(dtype)
        if self.state in LACKING:
            view = numbers.as_strided(self.shape, self.strides, self.offset)
            numbers.untyped_storage().resize_(0 if self.state == "emptied" else numbers.nbytes // 2)
            return view
        if self.state == "":
            numbers = guarded(numbers, self.at_end, written)
        tensor = numbers.as_strided(self.shape, self.strides, self.offset)
        match self.state:
            case "requires grad":
                return tensor.clone().requires_grad_()
            case "sparse":
                return tensor.to_sparse()
            case "sparse rows":
                return tensor.to_sparse_csr()
            case "mkldnn":
                return tensor.contiguous().to_mkldnn()
            case "negative":
                return torch._neg_view(tensor)
            case "conjugate":
                return tensor.conj()
            case "zero":
                return torch._efficientzerotensor(self.shape, dtype=dtype)
        return tensor


@dataclass(frozen=True)
class Same:
    """The same tensor as another argument."""

    argument: str


def dense(*shape: int, dtype: str = "float32", channels_last: bool = False) -> Made:
    """A contiguous or channels-last tensor."""
    order = [*range(len(shape))]
    if channels_last:
        order = [0, 2, 3, 1]
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return Made(shape, tuple(strides), dtype)


libc = ctypes.CDLL(None, use_errno=True)


def guarded(numbers: Tensor, at_end: bool, written: bool) -> Tensor:
    """A copy that ends or begins at an inaccessible page; read-only unless `written`."""
    if not numbers.numel():
        return numbers
    page = mmap.PAGESIZE
    inside = -(-numbers.nbytes // page) * page
    memory = mmap.mmap(-1, inside + 2 * page)
    offset = page + (inside - numbers.nbytes if at_end else 0)
    copy = torch.frombuffer(memory, dtype=numbers.dtype, count=numbers.numel(), offset=offset).copy_(numbers)
    begin = copy.data_ptr() - offset
    protect(begin, page)
    protect(begin + page + inside, page)
    if not written:
        protect(begin + page, inside, mmap.PROT_READ)
    return copy


def protect(address: int, size: int, allowed: int = 0) -> None:
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), allowed):
        raise OSError(ctypes.get_errno(), "mprotect")
