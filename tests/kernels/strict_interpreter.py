"""Triton's interpreter with the restrictions of a GPU.

The interpreter runs a launch's programs sequentially on host memory, and treats bf16 as 16-bit integers. It therefore
does not detect out-of-bounds accesses, races between programs, overflow of 32-bit offsets, and products of tiles too
small for tensor cores. `install` makes these errors, computes bf16 correctly, and halves the run time.
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
    """Rounds to the nearest even, like GPUs."""
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)


class Launch:
    """The memory accesses of one launch."""

    def __init__(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        self.name = name
        self.patched: set[int] = set()  # ids of modules
        self.extents = {
            argument: (t.data_ptr(), t.data_ptr() + _extent(t) * t.element_size())
            for argument, t in tensors.items()
            if t.numel()
        }
        self.loads: list[tuple[int, np.ndarray]] = []  # (program, addresses), in order of execution
        self.stores: list[tuple[int, np.ndarray]] = []

    def load(self, program: int, addresses: np.ndarray, size: int) -> None:
        self._check_bounds(program, addresses, size, "reads")
        written = list(itertools.takewhile(lambda store: store[0] == program, reversed(self.stores)))
        if written and np.isin(addresses, np.concatenate([stored for _, stored in written])).any():
            # On a GPU, only a barrier would order a write and a read by different threads of the program.
            raise AssertionError(f"{self.name}: program {program} reads back {self._describe(addresses[0])}")
        self.loads.append((program, np.unique(addresses)))

    def store(self, program: int, addresses: np.ndarray, size: int) -> None:
        self._check_bounds(program, addresses, size, "writes")
        unique = np.unique(addresses)
        if len(unique) < len(addresses):
            raise AssertionError(f"{self.name}: program {program} writes twice to {self._describe(unique[0])}")
        self.stores.append((program, unique))

    def check_races(self) -> None:
        """After the last program: raise AssertionError if two programs race."""
        if not self.stores:
            return
        stored, writers = _flatten(self.stores)
        order = np.argsort(stored, kind="stable")
        stored, writers = stored[order], writers[order]
        conflicts = np.flatnonzero((stored[1:] == stored[:-1]) & (writers[1:] != writers[:-1]))
        if len(conflicts):
            first, second = writers[conflicts[0]], writers[conflicts[0] + 1]
            place = self._describe(stored[conflicts[0]])
            raise AssertionError(f"{self.name}: programs {first} and {second} write to {place}")
        if not self.loads:
            return
        read_addresses, readers = _flatten(self.loads)
        positions = np.minimum(np.searchsorted(stored, read_addresses), len(stored) - 1)
        conflicts = np.flatnonzero((stored[positions] == read_addresses) & (writers[positions] != readers))
        if len(conflicts):
            reader, writer = readers[conflicts[0]], writers[positions[conflicts[0]]]
            place = self._describe(read_addresses[conflicts[0]])
            raise AssertionError(f"{self.name}: program {reader} reads {place}, which program {writer} writes")

    def _check_bounds(self, program: int, addresses: np.ndarray, size: int, what: str) -> None:
        inside = np.zeros(len(addresses), dtype=bool)
        for begin, end in self.extents.values():
            inside |= (addresses >= begin) & (addresses + size <= end)
        if not inside.all():
            raise AssertionError(f"{self.name}: program {program} {what} outside the tensors of its launch")

    def _describe(self, address: int) -> str:
        for argument, (begin, end) in self.extents.items():
            if begin <= address < end:
                return f"{argument}, byte {address - begin}"
        return "no tensor"


current: Launch | None = None
table_tensors: list[torch.Tensor] = []  # tensors whose addresses are in a table, not in an argument; set by tests


def install() -> None:
    """Check all further launches of this process. Repeated calls have no effect."""
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


def _replace(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a method by wrapper(original, self, ...)."""
    original = getattr(owner, name)
    setattr(owner, name, lambda self, *args, **kwargs: wrapper(original, self, *args, **kwargs))


def _launch(original: Callable[..., Any], executor: Any, *args: Any, **kwargs: Any) -> None:
    global current
    named = {**dict(zip(executor.arg_names, args)), **kwargs}
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    tensors |= {f"number {i} of the table": tensor for i, tensor in enumerate(table_tensors)}
    current = Launch(executor.fn.__name__, tensors)
    try:
        original(executor, *args, **kwargs)
        current.check_races()
    finally:
        current = None


def _patch_once(original: Callable[..., Any], function: Any) -> Any:
    """Patch triton.language once per launch, instead of for every function that a kernel calls."""
    named = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
    if current is not None and named <= current.patched:
        return interpreter._LangPatchScope()
    if current is not None:
        current.patched |= named
    return original(function)


def _load(original: Callable[..., Any], builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
    _record(Launch.load, builder, ptrs, mask)
    return original(builder, ptrs, mask, *rest)


def _store(original: Callable[..., Any], builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
    _record(Launch.store, builder, ptrs, mask)
    return original(builder, ptrs, value, mask, *rest)


def _record(record: Callable[..., None], builder: Any, ptrs: Any, mask: Any) -> None:
    addresses = np.broadcast_to(ptrs.data, np.broadcast_shapes(ptrs.data.shape, mask.data.shape))[mask.data]
    if len(addresses):
        record(current, builder.grid_idx[0], addresses.astype(np.int64), ptrs.get_element_ty().primitive_bitwidth // 8)


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


def _extent(tensor: torch.Tensor) -> int:
    """The number of elements from the first to the last in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))


def _flatten(accesses: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """All addresses, and the program of each address."""
    programs = np.repeat([program for program, _ in accesses], [len(addresses) for _, addresses in accesses])
    return np.concatenate([addresses for _, addresses in accesses]), programs
