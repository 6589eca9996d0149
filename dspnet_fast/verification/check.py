"""The check of one provider on one call: values, unwritten elements, writes elsewhere, determinism, leaks."""

from __future__ import annotations

import ctypes
import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import registry
from ..ops.provider import Provider
from . import error_rule
from .calls import Call, parameters

REPEATS = 5  # calls in an interval
INTERVALS = 8  # in each of which a leak makes memory grow; the first calls of a process may do so without a leak
LEAK = 64  # bytes per call from which growth counts


@dataclass(frozen=True)
class Reference:
    """What a call is compared with.

    Attributes:
        call: the call.
        seed: seed of its arguments.
        arguments: its random arguments; providers get copies of those that they write to.
        native: outputs and written arguments of the native body.
        exact: the same in float64.
        names: names of these results.
    """

    call: Call
    seed: int
    arguments: list[Any]
    native: list[Tensor]
    exact: list[Tensor]
    names: list[str]

    @classmethod
    def of(cls, call: Call, device: torch.device, seed: int) -> Reference:
        """Compute the reference of a call with random arguments."""
        native = registry.operators[call.operator].native
        arguments = call.random(device, seed)
        exact, _ = _results(native, call, [_map(value, _double) for value in arguments])
        results, names = _results(native, call, _copies(call, arguments))
        return cls(call, seed, arguments, results, exact, names)


def check(provider: Provider, reference: Reference) -> tuple[str, float]:
    """Check a provider on a call.

    Returns:
        The reason why the provider must not be used, or an empty string; and the largest error as a share of its bound.
    """
    call, arguments = reference.call, reference.arguments
    before = [_checksum(tensor) for tensor in _read(call, arguments)]
    with _filled_with_nan():
        given = _copies(call, arguments)
        results, _ = _results(provider.run, call, given)
    factor = error_rule.GRADIENT if call.operator.endswith("_backward") else error_rule.OUTPUT
    problem, share = error_rule.judge(reference.names, results, reference.native, reference.exact, factor)
    if problem:
        return problem, share
    if before != [_checksum(tensor) for tensor in _read(call, arguments)]:
        return "it changes an argument that it must only read", share
    if any(
        not torch.equal(*(_outside(tensor) for tensor in pair))
        for pair in zip(_written(call, given), _written(call, arguments), strict=True)
    ):
        return "it writes outside an argument", share
    for output, native in zip(results, reference.native, strict=True):
        if native.ndim == 4 and _is_channels_last(native) and not _is_channels_last(output):
            return "an output is not channels-last", share
    memory = {tensor.untyped_storage().data_ptr() for tensor in _tensors(given) if tensor.numel()}
    outputs = results[: len(results) - len(_written(call, given))]
    if any(output.untyped_storage().data_ptr() in memory for output in outputs if output.numel()):
        return "an output shares memory with an argument", share
    again, _ = _results(provider.run, call, _copies(call, arguments))
    for name, first, second in zip(reference.names, results, again, strict=True):
        if not torch.equal(first, second):
            return f"{name} differs between two calls with the same arguments", share
    return "", share


def leaks(provider: Provider, reference: Reference) -> str:
    """The reason why repeated calls take ever more memory, or an empty string."""
    given = _copies(reference.call, reference.arguments)

    def used_after_calls() -> dict[str, int]:
        for _ in range(REPEATS):
            provider.run(*given)
        return _bytes_in_use()

    before, least = used_after_calls(), dict[str, int]()
    for _ in range(INTERVALS):
        used = used_after_calls()
        growth = {kind: (used[kind] - before[kind]) // REPEATS for kind in used}
        least = {kind: min(growth[kind], least.get(kind, growth[kind])) for kind in used}
        if all(found < LEAK for found in least.values()):
            return ""
        before = used
    kind = max(least, key=lambda name: least[name])
    return f"every call leaves {least[kind]:,} bytes of {kind} allocated"


def _results(run: Callable[..., Any], call: Call, arguments: list[Any]) -> tuple[list[Tensor], list[str]]:
    """Outputs and written arguments of a call, with their names."""
    output = run(*arguments)
    outputs = [] if output is None else list(output) if isinstance(output, (tuple, list)) else [output]
    names = [f"output {index}" for index in range(len(outputs))]
    for name, value in _written_by_name(call, arguments):
        names += [name] * len(_tensors([value]))
    return outputs + _written(call, arguments), names


@functools.cache
def _written_names(operator: str) -> set[str]:
    schema = getattr(torch.ops.dspnet, operator).default._schema
    return {argument.name for argument in schema.arguments if argument.is_write}


def _written_by_name(call: Call, arguments: list[Any]) -> list[tuple[str, Any]]:
    names = _written_names(call.operator)
    return [(n, value) for n, value in zip(parameters(call.operator), arguments, strict=True) if n in names]


def _written(call: Call, arguments: list[Any]) -> list[Tensor]:
    return _tensors([value for _, value in _written_by_name(call, arguments)])


def _read(call: Call, arguments: list[Any]) -> list[Tensor]:
    written = {id(tensor) for tensor in _written(call, arguments)}
    return [tensor for tensor in _tensors(arguments) if id(tensor) not in written]


def _copies(call: Call, arguments: list[Any]) -> list[Any]:
    """The arguments, with copies of those that are written to."""
    written = {id(tensor) for tensor in _written(call, arguments)}
    return [_map(value, lambda tensor: _copy(tensor) if id(tensor) in written else tensor) for value in arguments]


def _copy(tensor: Tensor) -> Tensor:
    """A copy with the same memory around it."""
    assert tensor._base is not None
    return tensor._base.clone().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _outside(tensor: Tensor) -> Tensor:
    """The memory of an argument with zeros for the elements of the argument."""
    base = _copy(tensor)
    base.zero_()
    assert base._base is not None
    return base._base


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def _checksum(tensor: Tensor) -> int:
    base = tensor if tensor._base is None else tensor._base
    return int(base.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[base.itemsize]).sum())


def _double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64, copy=True) if tensor.is_floating_point() else tensor


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, list):
        return [_map(part, function) for part in value]
    return function(value) if isinstance(value, Tensor) else value


def _tensors(values: list[Any]) -> list[Tensor]:
    flat = [part for value in values for part in (value if isinstance(value, list) else [value])]
    return [part for part in flat if isinstance(part, Tensor)]


@contextmanager
def _filled_with_nan() -> Iterator[None]:
    """New tensors are filled with NaN instead of left uninitialised."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2: ten sizes."""

    _fields_ = [("sizes", ctypes.c_size_t * 10)]


HBLKHD, UORDBLKS = 4, 7  # bytes in blocks that were mapped one by one, and in all others


@functools.cache
def _mallinfo() -> Callable[[], _Mallinfo] | None:
    """glibc's mallinfo2, from version 2.33 on; None with other C libraries."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is not None:
        function.restype = _Mallinfo
    return function


def _bytes_in_use() -> dict[str, int]:
    gc.collect()
    used = {}
    if torch.cuda.is_initialized():
        used["GPU memory"] = torch.cuda.memory_allocated()
    if (mallinfo := _mallinfo()) is not None:
        sizes = mallinfo().sizes
        used["memory"] = sizes[HBLKHD] + sizes[UORDBLKS]
    return used
