"""Run a network and follow the labels of its channels through every ATen operation (`labels`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops.registry import get_policy, set_policy
from .labels import FIXED, Axes, Conflict, Labels
from .prefix import separate_prefixes

# Operations that only move values; they are applied to the labels themselves.
MOVES = {
    "_reshape_copy", "_unsafe_view", "channel_shuffle", "flip", "gather", "im2col", "index", "index_select",
    "native_channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "repeat", "roll", "take",
}  # fmt: skip
RESHAPES = {"view", "_unsafe_view", "_reshape_alias"}  # labels may have strides that a view does not allow
# Operations whose result has the labels of its first argument.
UNCHANGED = {
    "_log_softmax", "_softmax", "_to_copy", "bernoulli", "bernoulli_", "clone", "contiguous", "cumsum", "empty_like",
    "fill_", "full_like", "hardswish", "hardswish_", "native_dropout", "ones_like", "rand_like", "randn_like", "zero_",
    "zeros_like", "_safe_softmax", "masked_fill_", "lift_fresh", "uniform_", "normal_",
}  # fmt: skip
# Operations on the positions of [N, C, ...], by parts of their names.
SPATIAL = ("avg_pool", "max_pool", "upsample", "reflection_pad", "replication_pad", "grid_sampler")


class Tracer(TorchDispatchMode):
    """Follows labels from parameters and buffers to the outputs of a network.

    Attributes:
        labels: the sets of labels.
        users: by id of each parameter and buffer, paths of the modules that used it.
        path: names of the modules that run, from the outermost to the innermost.
        reasons: operations that fixed channels because their effect on channels is unknown, and the modules.
        blocks: modules to watch; set by the caller.
        returned: by watched module that ran, why it does not return the channels of its input, or an empty text.
    """

    def __init__(self, labels: Labels, sources: Sequence[tuple[Tensor, Axes]], names: dict[nn.Module, str]) -> None:
        super().__init__()
        self.labels = labels
        self._axes = WeakTensorKeyDictionary()
        for tensor, axes in sources:
            self._axes[tensor] = axes
        self._sources = {id(tensor) for tensor, _ in sources}
        self._names = names
        self.users: dict[int, set[str]] = {}
        self.path: list[str] = []
        self.reasons: dict[str, str] = {}
        self.blocks: set[nn.Module] = set()
        self.returned: dict[nn.Module, str] = {}

    def run(self, model: nn.Module, inputs: Sequence[Any]) -> list[tuple[Tensor, Axes]]:
        """Run the model; returns the tensors of its output with their labels."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(plain_operations())
            stack.callback(register_module_forward_pre_hook(self._enter).remove)
            stack.callback(register_module_forward_hook(self._leave).remove)
            with self:
                outputs = model(*inputs)
        return [(tensor, self.axes(tensor)) for tensor in tree_iter(outputs) if isinstance(tensor, Tensor)]

    def axes(self, tensor: Any) -> Axes:
        """The labels of a tensor."""
        if not isinstance(tensor, Tensor):
            return []
        if id(tensor) in self._sources:
            self.users.setdefault(id(tensor), set()).add(self.path[-1])
        compressed = (self.labels.compress(axis) for axis in self._axes.get(tensor, []))
        return [axis for axis in compressed if axis is not None]

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.path.append(self._names.get(module, self.path[-1] if self.path else ""))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.path.pop()
        if module in self.blocks:
            self.returned[module] = "it runs twice" if module in self.returned else self._difference(args, output)

    def _difference(self, args: Any, output: Any) -> str:
        """Why a module does not return the channels of its input; an empty text if it does."""
        if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor)):
            return "it does not map a tensor to a tensor"
        if args[0].shape != output.shape:
            return "its output has another shape than its input"
        received, returned = self.axes(args[0]), self.axes(output)
        equal = len(received) == len(returned) and all(map(torch.equal, received, returned))
        return "" if equal and returned else "it does not add its input to its output"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        try:
            found = self._propagate(func, name, args, kwargs, result)
        except Conflict:
            raise Conflict(f"{name} combines channels that do not belong together") from None
        results = result if isinstance(result, tuple | list) else [result]
        for tensor, axes in zip(results, found, strict=False):
            if isinstance(tensor, Tensor):
                fits = [all(n in (1, m) for n, m in zip(axis.shape, tensor.shape, strict=False)) for axis in axes]
                self.labels.fix([axis for axis, fit in zip(axes, fits, strict=True) if not fit])  # pooled channels
                self._axes[tensor] = [axis for axis, fit in zip(axes, fits, strict=True) if fit]
        return result

    def _propagate(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> list[Axes]:
        """The labels of each result of an operation."""
        inputs = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        if not any(self.axes(x) for x in inputs) and name not in RULES:
            return []
        if name in RULES:
            return RULES[name](self, args, kwargs, result)
        restrided = name in ("as_strided", "as_strided_")
        if (func.is_view and not restrided) or name in MOVES:
            return self._move(torch.reshape if name in RESHAPES else func, args, kwargs)
        if name in UNCHANGED or (restrided and args[0].shape == result.shape):
            return [self.axes(args[0])]
        if "batch_norm" in name:
            return self._batch_norm(inputs)
        if any(part in name for part in SPATIAL):
            return [self._spatial(self.axes(args[0]))]
        tags = func.tags
        if torch.Tag.pointwise in tags or name in ("_prelu_kernel", "copy_", "glu_jvp", "rrelu_with_noise"):
            return [self.aligned(*inputs)]
        if torch.Tag.reduction in tags or name in ("var_mean", "std_mean", "linalg_vector_norm", "norm"):
            return self._reduce(name, args, kwargs, result)
        if name.startswith("new_"):
            return []
        for x in inputs:
            self.labels.fix(self.axes(x))
        self.reasons.setdefault(name, self.path[-1] if self.path else "")
        return []

    def aligned(self, *tensors: Tensor) -> Axes:
        """Labels of an elementwise function of tensors."""
        return self.labels.align([(self.axes(x), x.shape) for x in tensors])

    def _move(self, func: Any, args: Any, kwargs: Any) -> list[Axes]:
        source = args[0]
        found: list[Axes] = []
        for axis in self.axes(source):
            moved = func(axis.double().expand(source.shape), *args[1:], **kwargs)  # some have no kernel for integers
            for index, part in enumerate(moved if isinstance(moved, tuple | list) else [moved]):
                if index == len(found):
                    found.append([])
                compressed = self.labels.compress(part)
                if compressed is not None:
                    found[index].append(compressed)
        return found

    def _spatial(self, axes: Axes) -> Axes:
        """Labels of a function of the positions: those that vary with the channel only."""
        kept = [axis for axis in axes if all(size == 1 for size in axis.shape[2:])]
        self.labels.fix([axis for axis in axes if not any(axis is other for other in kept)])
        return kept

    def _batch_norm(self, inputs: Sequence[Tensor]) -> list[Axes]:
        x, *vectors = inputs
        operands: list[tuple[Axes, Sequence[int]]] = [(self.axes(x), x.shape)]
        channel = [-1 if dim == 1 else 1 for dim in range(x.ndim)]
        for vector in vectors:
            if vector.ndim == 1:
                shape = [len(vector) if size == -1 else 1 for size in channel]
                operands.append(([axis.view(channel) for axis in self.axes(vector)], shape))
        return [self.labels.align(operands)]

    def _reduce(self, name: str, args: Any, kwargs: Any, result: Any) -> list[Axes]:
        x = args[0]
        results = [result] if isinstance(result, Tensor) else result
        keeps = results[0].ndim == x.ndim
        options = args[2:] if "norm" in name else args[1:]  # args[1] is the order of a norm
        named = kwargs.get("dim", next((value for value in options if isinstance(value, int | list | tuple)), None))
        if named is None or named == []:
            dims = list(range(x.ndim))
        else:
            dims = [dim % x.ndim for dim in ([named] if isinstance(named, int) else named)]
        if x.ndim - len(dims) != results[0].ndim and not keeps:
            dims = list(range(x.ndim))
        axes = self.labels.reduce(self.axes(x), dims)
        if not keeps:
            left = [dim for dim in range(x.ndim) if dim not in dims]
            axes = [axis.view([axis.shape[dim] for dim in left]) for axis in axes]
        return [axes for _ in results]


def _product(tracer: Tracer, a: Tensor, b: Tensor) -> Axes:
    """Labels of the batched matrix product of [..., N, K] and [..., K, M]."""
    one = [axis.unsqueeze(-2) for axis in tracer.axes(a)], (*a.shape[:-1], 1, a.shape[-1])
    other = [axis.mT.unsqueeze(-3) for axis in tracer.axes(b)], (*b.shape[:-2], 1, b.shape[-1], b.shape[-2])
    axes = tracer.labels.align([one, other])
    ndim = max(len(one[1]), len(other[1]))
    return [axis.squeeze(-1) for axis in tracer.labels.reduce(axes, [ndim - 1])]


def _addmm(tracer: Tracer, args: Any, kwargs: Any, result: Tensor) -> list[Axes]:
    bias, a, b = args
    return [tracer.labels.align([(tracer.axes(bias), bias.shape), (_product(tracer, a, b), result.shape)])]


def _channel_labels(tracer: Tracer, x: Tensor) -> Tensor:
    """Labels [C] of [N, C, ...]; those of channels that do not vary with C alone are fixed."""
    kept = [axis for axis in tracer._spatial(tracer.axes(x)) if axis.shape[0] == 1]
    tracer.labels.fix([axis for axis in tracer.axes(x) if axis.shape[0] > 1])
    return kept[0].flatten() if kept else torch.full((x.shape[1],), FIXED)


def _convolution(tracer: Tracer, args: Any, kwargs: Any, result: Tensor) -> list[Axes]:
    x, weight, bias, _, _, _, transposed, _, groups = args
    labels = tracer.labels
    rows, columns = (_weight_labels(tracer, weight, dim) for dim in (0, 1))
    labels.fix([axis for axis in tracer.axes(weight) if any(size > 1 for size in axis.shape[2:])])
    if x.shape[1:] == result.shape[1:] and x.shape[1] == 1:  # across channels, as efficient channel attention
        return [tracer.axes(x)]
    channels = _channel_labels(tracer, x)
    ins, outs = (rows, columns) if transposed else (columns, rows)
    if groups == 1:
        labels.unite(channels, ins)
    elif len(channels) % groups == 0:  # a whole group of input and output channels is kept or dropped
        per_group = channels.view(groups, -1)
        labels.unite(per_group, per_group[:, :1])
        labels.unite(rows.view(groups, -1), per_group[:, :1])
        labels.fix([columns])
        outs = per_group[:, 0].repeat_interleave(result.shape[1] // groups)
    shape = [-1 if dim == 1 else 1 for dim in range(result.ndim)]
    operands: list[tuple[Axes, Sequence[int]]] = [([outs.view(shape)] if outs.any() else [], result.shape)]
    if bias is not None:
        sizes = [len(bias) if size == -1 else 1 for size in shape]
        operands.append(([axis.view(shape) for axis in tracer.axes(bias)], sizes))
    return [labels.align(operands)]


def _weight_labels(tracer: Tracer, weight: Tensor, dim: int) -> Tensor:
    """Labels [size] of one dimension of a weight; FIXED without labels along this dimension alone."""
    for axis in tracer.axes(weight):
        if axis.shape[dim] == axis.numel():
            return axis.flatten()
        if axis.shape[dim] > 1:
            tracer.labels.fix([axis])
    return torch.full((weight.shape[dim],), FIXED)


def _layer_norm(tracer: Tracer, args: Any, kwargs: Any, result: Any) -> list[Axes]:
    return [tracer.aligned(*(x for x in args if isinstance(x, Tensor)))]


def _group_norm(tracer: Tracer, args: Any, kwargs: Any, result: Any) -> list[Axes]:
    x, weight, bias, _, channels, _, groups, _ = args
    if groups > 1:
        per_group = _channel_labels(tracer, x).view(groups, -1)
        tracer.labels.unite(per_group, per_group[:, :1])
    return tracer._batch_norm([tensor for tensor in (x, weight, bias) if tensor is not None])


def _cat(tracer: Tracer, args: Any, kwargs: Any, result: Tensor) -> list[Axes]:
    tensors = [x for x in args[0] if x.numel()]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % result.ndim
    labels = tracer.labels
    joined: list[list[Tensor]] = []
    others: list[tuple[Axes, list[int]]] = []
    for x in tensors:
        axes = tracer.axes(x)
        joined.append([axis for axis in axes if axis.shape[dim] > 1])
        rest = [axis for axis in axes if axis.shape[dim] == 1]
        others.append((rest, [1 if index == dim else size for index, size in enumerate(x.shape)]))
    axes = labels.align(others)
    if any(joined):
        parts = []
        for x, own in zip(tensors, joined, strict=True):
            labels.fix(own[1:])
            sizes = [x.shape[i] if i == dim else 1 for i in range(x.ndim)]
            parts.append(own[0] if own else torch.full(sizes, FIXED))
        shape = [max(part.shape[index] for part in parts) for index in range(result.ndim)]
        sized = [part.expand(*shape[:dim], part.shape[dim], *shape[dim + 1 :]) for part in parts]
        axis = labels.compress(torch.cat(sized, dim))
        axes = [*axes, *([] if axis is None else [axis])]
    return [axes]


def _stack(tracer: Tracer, args: Any, kwargs: Any, result: Tensor) -> list[Axes]:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % result.ndim
    columns = [([axis.unsqueeze(dim) for axis in tracer.axes(x)], x.unsqueeze(dim).shape) for x in args[0]]
    return [tracer.labels.align(columns)]


def _embedding(tracer: Tracer, args: Any, kwargs: Any, result: Tensor) -> list[Axes]:
    weight = args[0]
    tracer.labels.fix([axis for axis in tracer.axes(weight) if axis.shape[0] > 1])
    columns = _weight_labels(tracer, weight, 1)
    return [[columns.view(_last(result.ndim))] if columns.any() else []]


def _constant_pad(tracer: Tracer, args: Any, kwargs: Any, result: Tensor) -> list[Axes]:
    x, widths = args[:2]
    axes: Axes = []
    for axis in tracer.axes(x):
        own: list[int] = []
        for index in range(len(widths) // 2):
            own += widths[2 * index : 2 * index + 2] if axis.shape[-1 - index] > 1 else [0, 0]
        padded = tracer.labels.compress(nn.functional.pad(axis, own, value=FIXED))
        axes += [] if padded is None else [padded]
    return [axes]


def _last(ndim: int) -> list[int]:
    return [1] * (ndim - 1) + [-1]


Rule = Callable[[Tracer, Any, Any, Any], list[Axes]]
RULES: dict[str, Rule] = {
    "convolution": _convolution,
    "mm": lambda tracer, args, kwargs, result: [_product(tracer, *args[:2])],
    "bmm": lambda tracer, args, kwargs, result: [_product(tracer, *args[:2])],
    "addmm": _addmm,
    "baddbmm": _addmm,
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "cat": _cat,
    "stack": _stack,
    "embedding": _embedding,
    "constant_pad_nd": _constant_pad,
    "_weight_norm_interface": lambda tracer, args, kwargs, result: [tracer.aligned(*args[:2]), tracer.axes(args[1])],
}


@contextmanager
def plain_operations() -> Iterator[None]:
    """Compute nn.MultiheadAttention and slimmable layers by operations of PyTorch."""
    before = torch.backends.mha.get_fastpath_enabled(), get_policy()
    torch.backends.mha.set_fastpath_enabled(False)
    set_policy("eager")
    try:
        with separate_prefixes():  # whose labels would be those of an earlier width
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before[0])
        set_policy(before[1])
