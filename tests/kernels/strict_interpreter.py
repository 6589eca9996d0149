"""Triton's interpreter, held to what a GPU does.

The interpreter runs a launch's programs one after another on ordinary memory, and takes bf16 for the integers that it
is stored as. So it lets pass what a GPU does not: an access outside the launch's tensors, two programs that write to
one place or of which one reads what the other writes, sums of 32-bit offsets that overflow, products of tiles that
tensor cores do not have. `install` makes each of these an error, and bf16 right. It also takes half of the time off.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

SMALLEST_DOT = 16
BF16 = tl.bfloat16


def fp32_of_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bf16_of_fp32(values: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, as GPUs do."""
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)


class Launch:
    """The memory accesses of one launch."""

    def __init__(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        self.name = name
        self.patched: set[int] = set()  # ids of modules
        self.extents = {
            argument: (t.data_ptr(), t.data_ptr() + _span(t) * t.element_size())
            for argument, t in tensors.items()
            if t.numel()
        }
        self.loads: list[tuple[int, np.ndarray]] = []  # program, addresses; in the order of time
        self.stores: list[tuple[int, np.ndarray]] = []

    def load(self, program: int, addresses: np.ndarray, size: int) -> None:
        self._stay_inside(program, addresses, size, "reads")
        written = list(itertools.takewhile(lambda store: store[0] == program, reversed(self.stores)))
        if written and np.isin(addresses, np.concatenate([stored for _, stored in written])).any():
            # Between a program's threads, nothing but a barrier would order the two.
            raise AssertionError(f"{self.name}: program {program} reads back {self._place(addresses[0])}")
        self.loads.append((program, np.unique(addresses)))

    def store(self, program: int, addresses: np.ndarray, size: int) -> None:
        self._stay_inside(program, addresses, size, "writes")
        unique = np.unique(addresses)
        if len(unique) < len(addresses):
            raise AssertionError(f"{self.name}: program {program} writes twice to {self._place(unique[0])}")
        self.stores.append((program, unique))

    def judge(self) -> None:
        """After the last program: whether any two would race."""
        if not self.stores:
            return
        at, by = _flat(self.stores)
        order = np.argsort(at, kind="stable")
        at, by = at[order], by[order]
        clash = np.flatnonzero((at[1:] == at[:-1]) & (by[1:] != by[:-1]))
        if len(clash):
            first, second = by[clash[0]], by[clash[0] + 1]
            place = self._place(at[clash[0]])
            raise AssertionError(f"{self.name}: programs {first} and {second} write to {place}")
        if not self.loads:
            return
        read_at, read_by = _flat(self.loads)
        found = np.minimum(np.searchsorted(at, read_at), len(at) - 1)
        clash = np.flatnonzero((at[found] == read_at) & (by[found] != read_by))
        if len(clash):
            reader, writer = read_by[clash[0]], by[found[clash[0]]]
            place = self._place(read_at[clash[0]])
            raise AssertionError(f"{self.name}: program {reader} reads {place}, which program {writer} writes")

    def _stay_inside(self, program: int, addresses: np.ndarray, size: int, what: str) -> None:
        inside = np.zeros(len(addresses), dtype=bool)
        for begin, end in self.extents.values():
            inside |= (addresses >= begin) & (addresses + size <= end)
        if not inside.all():
            raise AssertionError(f"{self.name}: program {program} {what} outside the tensors of its launch")

    def _place(self, address: int) -> str:
        for argument, (begin, end) in self.extents.items():
            if begin <= address < end:
                return f"{argument}, byte {address - begin}"
        return "no tensor"


current: Launch | None = None
in_tables: list[torch.Tensor] = []  # what launches reach by addresses in a table, not by an argument: for tests to set


def install() -> None:
    """For all launches of this process from now on. Once is enough."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    if hasattr(builder, "strict"):
        return
    builder.strict = True
    _replace(executor, "__call__", _launch)
    _replace(builder, "create_masked_load", _load)
    _replace(builder, "create_masked_store", _store)
    _replace(builder, "cast_impl", _cast)
    _replace(builder, "create_dot", _dot)
    _replace(builder, "binary_op", _binary)
    interpreter._patch_lang = functools.partial(_patch_once, interpreter._patch_lang)


def _replace(owner: type, name: str, by: Callable[..., Any]) -> None:
    """The method becomes by(original, self, ...)."""
    original = getattr(owner, name)
    setattr(owner, name, lambda self, *args, **kwargs: by(original, self, *args, **kwargs))


def _launch(original: Callable[..., Any], executor: Any, *args: Any, **kwargs: Any) -> None:
    global current
    named = {**dict(zip(executor.arg_names, args)), **kwargs}
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    tensors |= {f"number {i} of the table": tensor for i, tensor in enumerate(in_tables)}
    current = Launch(executor.fn.__name__, tensors)
    try:
        original(executor, *args, **kwargs)
        current.judge()
    finally:
        current = None


def _patch_once(original: Callable[..., Any], function: Any) -> Any:
    """Puts the interpreter's functions into triton.language once a launch, not for each function a kernel calls."""
    named = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
    if current is not None and named <= current.patched:
        return interpreter._LangPatchScope()
    if current is not None:
        current.patched |= named
    return original(function)


def _load(original: Callable[..., Any], builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
    _touch(Launch.load, builder, ptrs, mask)
    return original(builder, ptrs, mask, *rest)


def _store(original: Callable[..., Any], builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
    _touch(Launch.store, builder, ptrs, mask)
    return original(builder, ptrs, value, mask, *rest)


def _touch(how: Callable[..., None], builder: Any, ptrs: Any, mask: Any) -> None:
    addresses = np.broadcast_to(ptrs.data, np.broadcast_shapes(ptrs.data.shape, mask.data.shape))[mask.data]
    if len(addresses):
        how(current, builder.grid_idx[0], addresses.astype(np.int64), ptrs.get_element_ty().primitive_bitwidth // 8)


def _cast(original: Callable[..., Any], builder: Any, source: Any, to: Any) -> Any:
    kinds = source.dtype.scalar, to.scalar
    if kinds == (BF16, tl.float32):
        return interpreter.TensorHandle(fp32_of_bf16(source.data), tl.float32)
    if kinds == (tl.float32, BF16):
        return interpreter.TensorHandle(bf16_of_fp32(source.data), BF16)
    assert BF16 not in kinds, f"from {kinds[0]} to {kinds[1]}: not supported here"
    return original(builder, source, to)


def _dot(original: Callable[..., Any], builder: Any, a: Any, b: Any, *rest: Any) -> Any:
    assert a.dtype.scalar == b.dtype.scalar, f"a product of {a.dtype} and {b.dtype}"
    assert min(*a.data.shape, *b.data.shape) >= SMALLEST_DOT, f"a product of {a.data.shape} and {b.data.shape}"
    if a.dtype.scalar == BF16:
        a, b = (interpreter.TensorHandle(fp32_of_bf16(side.data), tl.float32) for side in (a, b))
    return original(builder, a, b, *rest)


def _binary(original: Callable[..., Any], builder: Any, left: Any, right: Any, op: Any) -> Any:
    assert BF16 not in (left.dtype.scalar, right.dtype.scalar), "arithmetic in bf16: not supported here"
    if op in (np.add, np.subtract, np.multiply) and left.dtype.scalar in (tl.int32, tl.uint32):
        exact = op(left.data.astype(np.int64), right.data.astype(np.int64))
        limits = np.iinfo(left.data.dtype)
        assert exact.size == 0 or (limits.min <= exact.min() and exact.max() <= limits.max), "an offset overflows"
    return original(builder, left, right, op)


def _span(tensor: torch.Tensor) -> int:
    """Elements from the first to the last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))


def _flat(accesses: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """All addresses, and the program of each."""
    programs = np.repeat([program for program, _ in accesses], [len(addresses) for _, addresses in accesses])
    return np.concatenate([addresses for _, addresses in accesses]), programs
