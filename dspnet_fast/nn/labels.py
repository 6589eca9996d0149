"""Labels of channels: which channels of which tensors must be kept or dropped together.

Every position of every dimension of a parameter has a label. Labels of channels that meet, for example in a sum or in
the contraction of a matrix product, are united. The labels of a tensor are a list of integer tensors that broadcast to
its shape: the labels of a weight [O, I] are [O, 1] and [1, I], those of an image's features [1, C, 1, 1]. Along a
dimension without labels, the tensor's size is the same in all subnets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FIXED = 0  # label of channels that all subnets keep

Axes = list[Tensor]  # labels of a tensor


class Conflict(Exception):
    """Channels meet in a subnet that do not meet in the full network."""


class Labels:
    """Sets of labels that only grow (union-find).

    Attributes:
        frozen: whether uniting two sets raises `Conflict`.
    """

    def __init__(self) -> None:
        self._parents = np.zeros(1, dtype=np.int64)
        self.frozen = False

    def __len__(self) -> int:
        return len(self._parents)

    def new(self, count: int) -> Tensor:
        """Labels [count] that are each a set of its own."""
        first = len(self._parents)
        fresh = np.arange(first, first + count)
        self._parents = np.concatenate([self._parents, fresh])
        return torch.from_numpy(fresh)

    def roots(self, labels: Tensor) -> Tensor:
        """The smallest label of the set of each label."""
        found = self._parents[labels.numpy()]
        while True:
            further = self._parents[found]
            if np.array_equal(further, found):
                return torch.from_numpy(np.asarray(found))
            found = further

    def unite(self, one: Tensor, other: Tensor | int) -> None:
        """Unite the sets of labels at equal positions; shapes broadcast."""
        first, second = (self.roots(torch.as_tensor(labels)) for labels in (one, other))
        first, second = torch.broadcast_tensors(first, second)
        differing = first != second
        if not differing.any():
            return
        if self.frozen:
            raise Conflict
        for pair in torch.stack([first[differing], second[differing]], 1).unique(dim=0).tolist():
            low, high = sorted(self._find(label) for label in pair)
            self._parents[high] = low

    def _find(self, label: int) -> int:
        while self._parents[label] != label:
            self._parents[label] = label = self._parents[self._parents[label]]
        return label

    def fix(self, axes: Axes) -> None:
        """Keep all channels of these labels in every subnet."""
        for axis in axes:
            self.unite(axis, FIXED)

    def of_dimensions(self, shape: Sequence[int]) -> Axes:
        """New labels for every dimension of a tensor."""
        return [self.new(size).view(_along(dim, len(shape))) for dim, size in enumerate(shape) if size > 1]

    def compress(self, labels: Tensor) -> Tensor | None:
        """Reduce dimensions along which labels are constant to size 1; None if nothing varies.

        Channels that form a single set are fixed, because no subnet can drop the set.
        """
        for dim, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
            if stride == 0 and size > 1:
                labels = labels.narrow(dim, 0, 1)
        labels = self.roots(labels.long().contiguous())
        for dim, size in enumerate(labels.shape):
            first = labels.narrow(dim, 0, 1)
            if size > 1 and bool((labels == first).all()):
                labels = first
        if labels.numel() > 1:
            return labels
        if not self.frozen:
            self.fix([labels])
        return None

    def align(self, operands: Sequence[tuple[Axes, Sequence[int]]]) -> Axes:
        """Labels of an elementwise result of broadcast operands, which are given as labels and shapes."""
        ndim = max((len(shape) for _, shape in operands), default=0)
        placed = [
            ([axis.view(_right(axis.shape, ndim)) for axis in axes], _right(shape, ndim)) for axes, shape in operands
        ]
        batched = any(shape[:1] > [1] for _, shape in placed)
        if batched:
            self._fix_tables(placed)
        result: Axes = []
        for axes, _ in placed:
            for axis in axes:
                partners = [other for other in result if _shared(axis, other)]
                merged = axis
                for partner in partners:
                    self.unite(merged, partner)
                    merged = torch.broadcast_tensors(merged, partner)[0]
                result = [other for other in result if not any(other is partner for partner in partners)] + [merged]
        for axis in result:
            for axes, shape in placed:
                extends = any(size > 1 and shape[dim] > 1 for dim, size in enumerate(axis.shape))
                if extends and not any(_shared(axis, own) for own in axes):
                    inner = _inside_heads(axis, shape) if batched else []
                    for dim in inner:
                        self.unite(axis, axis.narrow(dim, 0, 1))
                    self.fix([] if inner else [axis])
        return self._compressed(result)

    def _fix_tables(self, placed: list[tuple[Axes, list[int]]]) -> None:
        """Keep all channels of what every head uses, such as a rotary embedding, so that heads can be dropped."""
        for index, (table, shape) in enumerate(placed):
            heads = [axis for axes, _ in placed for axis in axes if _inside_heads(axis, shape)]
            shared = [own for own in table if any(_shared(own, axis) for axis in heads)]
            if shared:
                self.fix(shared)
                placed[index] = self._compressed(table), shape

    def reduce(self, axes: Axes, dims: Sequence[int]) -> Axes:
        """Labels after a sum over dimensions, which are kept with size 1. A set that varies along other dimensions too,
        such as the channels of each attention head, becomes one channel."""
        result = []
        for axis in axes:
            reduced = [dim for dim in dims if axis.shape[dim] > 1]
            first = axis
            for dim in reduced:
                first = first.narrow(dim, 0, 1)
            if reduced and first.numel() > 1:
                self.unite(axis, first)
            if first.numel() > 1:
                result.append(first)
        return self._compressed(result)

    def _compressed(self, axes: Axes) -> Axes:
        compressed = (self.compress(axis) for axis in axes)
        return [axis for axis in compressed if axis is not None]


def _along(dim: int, ndim: int) -> list[int]:
    """The shape of labels that vary along one dimension."""
    return [-1 if index == dim else 1 for index in range(ndim)]


def _right(shape: Sequence[int], ndim: int) -> list[int]:
    """A shape with leading dimensions of size 1."""
    return [1] * (ndim - len(shape)) + list(shape)


def _inside_heads(axis: Tensor, shape: Sequence[int]) -> list[int]:
    """Dimensions inside of all others of labels, such as the channels of each head, if an operand without a batch has
    these alone."""
    dims = [dim for dim, size in enumerate(axis.shape) if size > 1]
    inner, outer = [dim for dim in dims if shape[dim] > 1], [dim for dim in dims if shape[dim] == 1]
    return inner if shape[0] == 1 and inner and outer and max(outer) < min(inner) else []


def _shared(one: Tensor, other: Tensor) -> bool:
    """Whether both labels vary along a common dimension."""
    return any(first > 1 and second > 1 for first, second in zip(one.shape, other.shape, strict=True))
