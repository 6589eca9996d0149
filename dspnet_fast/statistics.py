"""Post-statistics: batch normalisation statistics of each subnet, measured after training.

In training every subnet normalises by the moments of its batches, so no single running average fits all subnets. After
training, each subnet processes the same batches once more. The moments of every batch normalisation layer are merged
exactly, including the variance between batches (Chan et al. 1979), and stored by the subnet's name. They are no part of
the state_dict: `measured_statistics` and `load_statistics` save and restore them. A change of the model's weights makes
them invalid.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .machine import in_float64
from .nn import activate
from .nn.batch_norm import Observer, SlimBatchNorm
from .nn.versions import WeightVersions
from .subnets import Subnet


class Moments:
    """Running count, mean and sum of squared deviations per channel, in float64.

    Attributes:
        count: number of values per channel.
        mean: mean, [C].
        squares: sum of squared deviations from the mean, [C].
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Merge the mean [C] and biased variance [C] of `count` values per channel."""
        mean, squares = in_float64(mean), in_float64(variance) * count
        delta = mean - self.mean
        total = self.count + count
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + squares + delta**2 * (self.count * count / total)
        self.count = total

    def result(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean [C] and biased variance [C]."""
        assert isinstance(self.mean, Tensor) and isinstance(self.squares, Tensor)
        return self.mean.to(dtype), (self.squares / self.count).to(dtype)


def _batch_norms(model: nn.Module) -> dict[str, SlimBatchNorm]:
    return {path: module for path, module in model.named_modules() if isinstance(module, SlimBatchNorm)}


def _adding_to(moments: dict[tuple[str, str | None], Moments], path: str, norm: SlimBatchNorm) -> Observer:
    def observe(means: Tensor, variances: Tensor, count: int) -> None:
        for mean, variance in zip(means, variances, strict=True):
            moments[path, norm.active_dn].add(mean, variance, count)

    return observe


@torch.no_grad()
def post_statistics(
    model: nn.Module, dns: Iterable[Subnet | str | float | None], batches: Iterable[Tensor | tuple[Any, ...]]
) -> int:
    """Measure the batch normalisation statistics of subnets in one pass over `batches`, and store them in the model.

    Args:
        model: a model of slimmable layers; left in evaluation mode.
        dns: the subnets, in forms that `activate` takes.
        batches: inputs of the model, at least one, or tuples of its inputs; each is normalised by its own moments.

    Returns:
        The number of inputs processed.

    Raises:
        ValueError: if `batches` is empty.
        TypeError: if a batch is no tensor or tuple, for example a list of images and labels, or a tuple with more than
            the model takes.

    Example:
        >>> model = nn.Sequential(SlimConv2d(3, 16, 1), SlimBatchNorm2d(16))
        >>> post_statistics(model, [0.5, None], [torch.randn(8, 3, 4, 4)])
        8
    """
    dns = list(dns)
    norms = _batch_norms(model)
    moments: dict[tuple[str, str | None], Moments] = defaultdict(Moments)  # by layer and subnet
    seen = 0
    model.eval()
    try:
        for path, norm in norms.items():
            norm.train()
            norm.observer = _adding_to(moments, path, norm)
        for batch in batches:
            inputs = batch if isinstance(batch, tuple) else (batch,)
            if not inputs or not isinstance(inputs[0], Tensor):
                raise TypeError(
                    f"a batch is a {type(batch).__name__}: give the model's input, without labels, or a tuple of inputs"
                )
            try:
                inspect.signature(model.forward).bind(*inputs)
            except TypeError as error:
                raise TypeError(
                    f"{type(model).__name__} does not take the {len(inputs)} values of a batch ({error}): give its "
                    "inputs, without labels"
                ) from None
            seen += len(inputs[0])
            for dn in dns:
                with activate(model, dn):
                    model(*inputs)
    finally:
        for norm in norms.values():
            norm.eval()
            norm.observer = None
    if not seen:
        raise ValueError("post_statistics needs at least one batch")
    versions = WeightVersions(model)
    for (path, dn), measured in moments.items():
        norm = norms[path]
        norm.measured_with = versions
        norm.measured[dn] = measured.result(torch.float32 if norm.weight is None else norm.weight.dtype)
    return seen


def measured_statistics(model: nn.Module, dns: Iterable[Subnet]) -> dict[str, Tensor]:
    """The stored statistics as a flat dictionary.

    Args:
        model: a model of slimmable layers.
        dns: the subnets.

    Returns:
        Copies of the tensors `<subnet>/<layer>.running_mean` and `<subnet>/<layer>.running_var`, each [C].
    """
    flat = {}
    for dn in dns:
        with activate(model, dn):
            for path, norm in _batch_norms(model).items():
                norm._drop_stale()
                if norm.active_dn in norm.measured:
                    mean, variance = norm.measured[norm.active_dn]
                    flat[f"{dn}/{path}.running_mean"] = mean.clone()
                    flat[f"{dn}/{path}.running_var"] = variance.clone()
    return flat


def load_statistics(model: nn.Module, dns: Iterable[Subnet], flat: dict[str, Tensor]) -> None:
    """Store the result of `measured_statistics` in a model.

    Args:
        model: a model of slimmable layers.
        dns: the subnets.
        flat: the dictionary; subnets and layers not in it are left unchanged.
    """
    versions = WeightVersions(model)
    for dn in dns:
        with activate(model, dn):
            for path, norm in _batch_norms(model).items():
                if f"{dn}/{path}.running_mean" in flat:
                    norm._drop_stale()
                    norm.measured_with = versions
                    pair = (flat[f"{dn}/{path}.running_mean"], flat[f"{dn}/{path}.running_var"])
                    device = next(model.parameters()).device
                    norm.measured[norm.active_dn] = (pair[0].to(device), pair[1].to(device))
