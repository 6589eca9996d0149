"""Batch normalisation over a prefix of the channels, with statistics per view and per subnet.

Affine parameters are shared by all subnets. Running statistics belong to the full network alone: an average over
subnets would describe none of them. A subnet is evaluated with statistics measured for it (`dspnet_fast.statistics`),
kept by its name, since subnets of different widths can share a layer's channel count.

Whatever the statistics are, normalisation is a scale and a shift per channel: gamma / sqrt(var + eps) and beta - mean
scale. The kinds of batch normalisation differ only in the mean and the variance that they put there, `_statistics`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops import scale_shift, slim_batch_norm
from .deferred import ConvOutput, Deferred
from .sized import main_grad

# Called with mean and biased variance [V, C] of each view, and the number of values that each was taken from.
Observer = Callable[[Tensor, Tensor, int], None]


class SlimBatchNorm(_BatchNorm):
    """What SlimBatchNorm1d and SlimBatchNorm2d share; the number of channels is taken from the input.

    Attributes:
        active_dn: the subnet that computes; None is the full network.
        views: batches hold this many views, each normalised by itself in training.
        bn_groups: so many neighbouring views are parts of one, as ranks have parts of a batch: running statistics take
            their mean as one step.
        process_group: where set, statistics are those of the whole batch over these ranks (synchronised batch
            normalisation); every rank must have as many images. Not while there is an observer: what one rank measures
            is its own.
        observer: where set, it gets the moments of every batch instead of the running statistics.
    """

    active_dn: str | None = None
    views: int = 1
    bn_groups: int = 1
    process_group: dist.ProcessGroup | None = None
    observer: Observer | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.measured: dict[str | None, tuple[Tensor, Tensor]] = {}  # active_dn -> mean [C], variance [C]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.measured = {dn: (fn(mean), fn(variance)) for dn, (mean, variance) in self.measured.items()}
        return super()._apply(fn, recurse)

    def evaluation_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] for the active subnet in evaluation: measured for it, or the running ones if full.

        Raises RuntimeError for a subnet that has not been measured.
        """
        if self.active_dn in self.measured:
            return self.measured[self.active_dn]
        if self.active_dn is None and self.running_mean is not None and self.running_var is not None:
            return self.running_mean, self.running_var
        raise RuntimeError(
            f"no batch normalisation statistics for {self.active_dn or 'the full network'}: "
            "measure them first with dspnet_fast.statistics.post_statistics(model, dns, batches)"
        )

    @property
    def batch_views(self) -> int:
        """Views of which moments are wanted; 0 where kept statistics are used instead."""
        if self.training:
            return self.views
        return 0 if self.track_running_stats or self.active_dn in self.measured else 1

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: ConvOutput) -> Deferred: ...

    def forward(self, x: Any) -> Any:
        """Normalise [N, C, ...] per channel: by each view's own batch in training, by kept statistics otherwise.

        A `ConvOutput` becomes an `Deferred`: its normalisation is computed, but left to whoever reads it.
        """
        channels = x.shape[1]
        if channels > self.num_features:
            raise ValueError(f"{type(self).__name__} has {self.num_features} channels, the input has {channels}")
        if isinstance(x, ConvOutput):
            return Deferred(x.y, *self._scale_shift(x))
        self._check_input_dim(x)
        weight = None if self.weight is None else self.weight[:channels]
        bias = None if self.bias is None else self.bias[:channels]
        views = self.batch_views
        if not views:
            mean, variance = self._kept_statistics(channels)
            return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, self.eps)
        if len(x) % views:
            raise ValueError(f"a batch of {len(x)} is not {views} views of equal size")
        y, mean, variance = slim_batch_norm(x, weight, bias, self.eps, views)
        if not self._own_statistics:
            self._observe(mean, variance, self._count(x.shape, views))
            return y
        scale, shift = self._scale_shift(ConvOutput(x, mean, variance))
        spread = len(scale), 1, channels, *(x.ndim - 2) * [1]
        return (x.unflatten(0, (views, -1)) * scale.view(spread) + shift.view(spread)).flatten(0, 1).to(x.dtype)

    def _scale_shift(self, raw: ConvOutput) -> tuple[Tensor, Tensor]:
        """scale and shift [V, C] of the deferred normalisation; one row with kept statistics."""
        if len(raw.mean):
            mean, variance = self._statistics(raw.mean, raw.variance, self._count(raw.shape, len(raw.mean)))
        else:
            mean, variance = (kept[None] for kept in self._kept_statistics(raw.shape[1]))
        return scale_shift(
            mean, variance, self.weight, main_grad(self.weight), self.bias, main_grad(self.bias), self.eps
        )

    @property
    def _own_statistics(self) -> bool:
        """Whether `_statistics` is more than the moments of this rank's batch."""
        return self._group is not None

    @property
    def _group(self) -> dist.ProcessGroup | None:
        """The ranks whose batch this one's is a part of."""
        return self.process_group if self.observer is None else None

    def _statistics(self, mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """What to normalise a batch by, given its moments [V, C] over `count` values each."""
        if self._group is not None:
            mean, variance = _over_ranks(mean, variance, self._group)
            count *= self._group.size()
        self._observe(mean, variance, count)
        return mean, variance

    def _count(self, shape: torch.Size, views: int) -> int:
        """Values per channel and view; ValueError for a single one, which has no variance."""
        count = shape.numel() // (shape[1] * views)
        if count < 2 and self.training:
            raise ValueError(
                f"batch normalisation in training needs at least two values per channel, got {list(shape)}"
            )
        return count

    @torch.no_grad()
    def _observe(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Tell the observer, or else update the running statistics if the full network computes, view by view."""
        if not self.training:
            return
        self.measured.clear()  # they described weights that training is about to change
        if self.observer is not None:
            self.observer(mean, variance, count)
            return
        if not (self.track_running_stats and self.active_dn is None and mean.shape[1] == self.num_features):
            return
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        unbiased = variance * (count / (count - 1))
        mean, unbiased = (moments.unflatten(0, (-1, self.bn_groups)).mean(1) for moments in (mean, unbiased))
        for view_mean, view_variance in zip(mean, unbiased, strict=True):
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(view_mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(view_variance.to(self.running_var.dtype), momentum)

    def _kept_statistics(self, channels: int) -> tuple[Tensor, Tensor]:
        mean, variance = self.evaluation_statistics()
        if len(mean) != channels:
            raise ValueError(
                f"statistics of {len(mean)} channels for an input of {channels}: activate(model, dn) the subnet first"
            )
        return mean, variance


def _over_ranks(mean: Tensor, variance: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Moments of the ranks' batches together, all of one size, by two all-reduces of vectors; differentiable."""
    together = _Sum.apply(mean, group) / group.size()
    return together, _Sum.apply(variance + (mean - together).square(), group) / group.size()


class _Sum(torch.autograd.Function):
    """The sum over ranks. What each of them makes of it depends on every term, so gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class SlimBatchNorm2d(SlimBatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` over the first C of `num_features` channels of [N, C, H, W]."""


class SlimBatchNorm1d(SlimBatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` over the first C of `num_features` features of [N, C] or [N, C, L]."""


class MomentumBatchNorm(SlimBatchNorm):
    """Batch normalisation with momentum statistics, for the target network (Momentum^2 Teacher, Li et al. 2021).

    View v with mean m_v and unbiased variance s_v is normalised by

        mu = alpha m_v + (1 - alpha) M        var = alpha s_v + (1 - alpha) V

    and after all views of a batch  M <- alpha mean_v(m_v) + (1 - alpha) M, V likewise with s_v. M and V are the
    buffers `running_mean` and `running_var`; `num_batches_tracked` counts batches. `alpha` goes from 1 to 0 over a
    training run and is set from outside, as a number or as a scalar on the device. It is not slimmable: the target is
    always the full network. With `double_correction` the variance is multiplied by n / (n - 1) a second time, as the
    published code does.
    """

    alpha: float | Tensor = 1.0
    double_correction: bool = False

    @property
    def _own_statistics(self) -> bool:
        return True

    def _count(self, shape: torch.Size, views: int) -> int:
        if shape[1] != self.num_features:
            raise ValueError(f"momentum batch normalisation of {self.num_features} channels is not slimmable")
        return super()._count(shape, views)

    @torch.no_grad()
    def _statistics(self, mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor]:
        if self._group is not None:
            mean, variance = _over_ranks(mean, variance, self._group)
            count *= self._group.size()
        variance = variance * (count / (count - 1)) ** (2 if self.double_correction else 1)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        mean, variance = mean.to(self.running_mean.dtype), variance.to(self.running_var.dtype)
        alpha = self.alpha.to(mean.dtype) if isinstance(self.alpha, Tensor) else self.alpha
        blended = self.running_mean.lerp(mean, alpha), self.running_var.lerp(variance, alpha)
        self.running_mean.lerp_(mean.mean(0), alpha)
        self.running_var.lerp_(variance.mean(0), alpha)
        self.num_batches_tracked.add_(1)
        return blended


class MomentumBatchNorm2d(MomentumBatchNorm, nn.BatchNorm2d):
    """`MomentumBatchNorm` of [N, C, H, W]."""


class MomentumBatchNorm1d(MomentumBatchNorm, nn.BatchNorm1d):
    """`MomentumBatchNorm` of [N, C] or [N, C, L]."""
