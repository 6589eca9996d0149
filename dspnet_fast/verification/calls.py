"""The operator calls of a model, recorded on the meta device without computing, and random arguments for them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops import registry

ALIGNMENT = 64  # bytes; the offset of a view within its storage is kept up to multiples of it
GUARD = 64  # elements beside a written argument, which a provider must leave unchanged
ODD_VARIANTS = 4  # further calls per operator with odd sizes


@dataclass(frozen=True)
class Layout:
    """A tensor without its values: sizes and strides, offset in elements, dtype."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """The layout of a tensor."""
        offset = int(tensor.storage_offset()) % (ALIGNMENT // tensor.itemsize)
        return cls(tuple(tensor.shape), tuple(tensor.stride()), offset, tensor.dtype)

    def allocate(self, device: torch.device) -> Tensor:
        """A tensor of this layout, with GUARD elements before and after it in its base."""
        extent = max(0, 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True)))
        base = torch.zeros(self.offset + extent + 2 * GUARD, dtype=self.dtype, device=device)
        return base.as_strided(self.shape, self.stride, self.offset + GUARD)

    def resized(self, old: int, new: int) -> Layout | None:
        """This layout with `new` in place of every size `old`; None if it is neither contiguous nor channels-last."""
        shape = tuple(new if size == old else size for size in self.shape)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            if memory_format is torch.channels_last and len(shape) != 4:
                continue
            like = (torch.empty(s, device="meta").contiguous(memory_format=memory_format) for s in (self.shape, shape))
            before, after = (tensor.stride() for tensor in like)
            if before == self.stride:
                return replace(self, shape=shape, stride=after)
        return None


@dataclass(frozen=True)
class Call:
    """A call of an operator: its arguments by position, with a `Layout` for each tensor."""

    operator: str
    arguments: tuple[Any, ...]

    def describe(self) -> str:
        """The shapes of the tensors by name."""
        shapes = []
        for name, argument in zip(parameters(self.operator), self.arguments, strict=True):
            layouts = [part for part in _parts(argument) if isinstance(part, Layout)]
            shapes += [f"{name} {'x'.join(map(str, layout.shape)) or 'scalar'}" for layout in layouts[:1]]
        return ", ".join(shapes)

    def resized(self, old: int, new: int) -> Call | None:
        """This call with the size `new` for `old` in all its arguments, or None if there is no such call."""
        arguments: list[Any] = []
        for argument in self.arguments:
            if isinstance(argument, Layout):
                argument = argument.resized(old, new)
                if argument is None:
                    return None
            elif type(argument) is int and argument == old:
                argument = new
            elif isinstance(argument, tuple):
                return None
            arguments.append(argument)
        return replace(self, arguments=tuple(arguments))

    def is_valid(self) -> bool:
        """Whether the native body accepts the arguments. Computes it: not all shape functions check sizes."""
        try:
            registry.operators[self.operator].native(*self.random(torch.device("cpu"), 0))
        except (RuntimeError, ValueError, IndexError):
            return False
        return True

    def random(self, device: torch.device, seed: int) -> list[Any]:
        """Random arguments, the same for the same seed; bool tensors are true for an even one."""
        generator = torch.Generator(device).manual_seed(seed)
        names = parameters(self.operator)
        return [
            _made(argument, functools.partial(_random, name, device, generator, seed % 2 == 0))
            for name, argument in zip(names, self.arguments, strict=True)
        ]


@functools.cache
def parameters(operator: str) -> list[str]:
    """The names of an operator's parameters."""
    return list(inspect.signature(registry.operators[operator].native).parameters)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Call, None] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "dspnet":
            name = function._schema.name.removeprefix("dspnet::")
            operator = registry.operators[name]
            bound = inspect.signature(operator.native).bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            self.calls[Call(name, tuple(map(_recorded, bound.arguments.values())))] = None
            if operator.parts:  # called instead if a provider of the operator is refused
                with self:
                    return operator.native(*bound.args)
        return function(*args, **(kwargs or {}))


def record(run: Callable[[], object]) -> list[Call]:
    """The different operator calls of a function that computes on the meta device, in their order."""
    with _Recorder() as recorder:
        run()
    return list(recorder.calls)


def odd_variants(calls: Iterable[Call]) -> list[Call]:
    """Calls like these, the smallest of each operator first, with one size replaced by an odd one."""
    by_operator: dict[str, list[Call]] = {}
    for call in calls:
        by_operator.setdefault(call.operator, []).append(call)
    found: dict[Call, None] = {}
    for several in by_operator.values():
        variants = (variant for call in sorted(several, key=_elements) for variant in _odd(call))
        new = dict.fromkeys(variant for variant, _ in zip(variants, range(ODD_VARIANTS), strict=False))
        found |= new
    return [call for call in found if call not in calls]


def _odd(call: Call) -> Iterator[Call]:
    layouts = [part for argument in call.arguments for part in _parts(argument) if isinstance(part, Layout)]
    sizes = dict.fromkeys(size for layout in layouts for size in layout.shape if size > 2 and size % 2 == 0)
    for size in sizes:
        variant = call.resized(size, size - 1)
        if variant is not None and variant.is_valid():
            yield variant


def _elements(call: Call) -> int:
    layouts = [part for argument in call.arguments for part in _parts(argument) if isinstance(part, Layout)]
    return sum(torch.Size(layout.shape).numel() for layout in layouts)


def _parts(argument: Any) -> tuple[Any, ...]:
    return argument if isinstance(argument, tuple) else (argument,)


def _recorded(value: Any) -> Any:
    """An argument with layouts for tensors and tuples for lists."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_recorded, value))
    return Layout.of(value) if isinstance(value, Tensor) else value


def _made(argument: Any, make: Callable[[Layout], Tensor]) -> Any:
    """A recorded argument with tensors for layouts and lists for tuples."""
    if isinstance(argument, tuple):
        return [_made(part, make) for part in argument]
    return make(argument) if isinstance(argument, Layout) else argument


# Values are multiples of a power of two, few bits wide: scale * x + shift is then exact in every precision, and no
# rounding moves it across a kink of an activation function, where gradients jump.
GRID = {"x": 1 / 32, "scale": 1 / 8, "shift": 1 / 256}


def _random(name: str, device: torch.device, generator: torch.Generator, flag: bool, layout: Layout) -> Tensor:
    """A tensor of values that an argument of this name may have; `flag` if it is bool."""
    tensor = layout.allocate(device)
    base = tensor._base
    assert base is not None
    if layout.dtype == torch.bool:
        return tensor.fill_(flag)
    if not layout.dtype.is_floating_point:
        return tensor
    if ("gate" in name or "variance" in name or not layout.shape) and not name.startswith("grad"):
        low = 0.5 if "variance" in name else 0.0
        base.uniform_(low, low + 1, generator=generator)
        return tensor
    base.normal_(generator=generator)
    if (step := GRID.get("x" if name == "residual" else name.removeprefix("residual_"))) is not None:
        base.div_(step).round_().clamp_(-127, 127).mul_(step)
    if name == "shift":
        base.add_(1 / 512)  # no value of scale * x + shift is a kink: those are multiples of 1 / 256
    return tensor
