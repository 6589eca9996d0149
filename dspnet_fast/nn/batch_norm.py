"""Batch normalisation over a prefix of the channels, with statistics per view and per subnet.

All subnets share the affine parameters. Only the full network updates the running statistics, because an average over
subnets would fit none of them. The other subnets are evaluated with statistics that
`dspnet_fast.statistics.post_statistics` measures and stores by the subnet's name: subnets of different widths can have
the same number of channels in a layer.

Normalisation is a scale and a shift per channel, gamma / sqrt(var + eps) and beta - mean * scale. Subclasses override
`_statistics` to use another mean and variance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self, TypedDict, Unpack, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops import scale_shift, slim_batch_norm
from ..ops.deferred import upcast
from ..ops.registry import defers_normalization, uses_pytorch
from .attributes import AttributeChanges
from .deferred import ConvOutput, Deferred
from .deferred_tensor import DeferredTensor, computed, moments_of
from .prefix import prefixes
from .recomputation import follow
from .sized import main_grad
from .versions import WeightVersions

# Called with the mean and biased variance [V, C] of each view and the number of values per channel and view.
Observer = Callable[[Tensor, Tensor, int], None]
Statistics = tuple[Tensor | None, Tensor | None]


class SlimBatchNorm(_BatchNorm):
    """Base class of SlimBatchNorm1d and SlimBatchNorm2d; the number of channels is taken from the input.

    Attributes:
        active_dn: name of the active subnet; None for the full network. Set by `activate`.
        views: number of augmented views, which are equal, consecutive parts of the batch. Set by `activate`.
        view: index of the only view in the input, if each view has a forward pass of its own; None if the input holds
            all views.
        bn_groups: number of ghost-batch-norm groups per view: in training each group is normalised separately. The
            running statistics are updated once per view, with the mean over its groups. Ignored while `observer` is
            set.
        process_group: ranks that normalise by the moments of their batches together (synchronised batch
            normalisation); every rank must have the same number of images. None for the rank's batch alone. Ignored
            while `observer` is set.
        observer: called with the moments of every batch instead of updating the running statistics.
        measured: mean [C] and variance [C] for evaluation, by subnet name. Training deletes them.
        measured_with: versions of the weights they were measured with; statistics of other weights are not used.
    """

    active_dn: str | None = None
    views: int = 1
    view: int | None = None
    bn_groups: int = 1
    process_group: dist.ProcessGroup | None = None
    observer: Observer | None = None
    measured_with: WeightVersions | None = None

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
        self.measured: dict[str | None, tuple[Tensor, Tensor]] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.measured = {dn: (fn(mean), fn(variance)) for dn, (mean, variance) in self.measured.items()}
        return super()._apply(fn, recurse)

    def evaluation_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance for the active subnet in evaluation: measured, or for the full network the running ones.

        Returns:
            Mean [C] and variance [C].

        Raises:
            RuntimeError: if no statistics were measured for the subnet, or the weights have changed since.
        """
        self._drop_stale()
        if self.active_dn in self.measured:
            return self.measured[self.active_dn]
        if self.active_dn is None and self.running_mean is not None and self.running_var is not None:
            return self.running_mean, self.running_var
        raise RuntimeError(
            f"no batch normalisation statistics for {self.active_dn or 'the full network'}: "
            "measure them first with dspnet_fast.statistics.post_statistics(model, dns, batches)"
        )

    def _drop_stale(self) -> None:
        """Delete statistics that were measured with other weights."""
        versions = self.measured_with
        if versions is not None and not torch.compiler.is_compiling() and self.measured and not versions.unchanged():
            self.measured.clear()

    @property
    def batch_views(self) -> int:
        """Number of parts of the batch to compute moments of; 0 if stored statistics are used instead."""
        if self.training:
            return (self.views if self.view is None else 1) * (self.bn_groups if self.observer is None else 1)
        return 0 if self.track_running_stats or self.active_dn in self.measured else 1

    def uses_moments_of(self, channels: int) -> bool:
        """Whether `forward` will normalise an output of a convolution by its own moments, with today's parameters."""
        if not self.training or self.changes_moments or channels > self.num_features:
            return False
        return not self._forward_pre_hooks  # which may change the parameters

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: ConvOutput) -> Deferred: ...

    def forward(self, x: Any) -> Any:
        """Normalise by the moments of each view in training, and by stored statistics in evaluation.

        Args:
            x: a Tensor [N, C, ...], or a `ConvOutput`, whose normalisation is deferred.

        Returns:
            A Tensor like x, or a `Deferred` for a `ConvOutput`.

        Raises:
            RuntimeError: in evaluation, if no statistics were measured for the active subnet.
            ValueError: if the number of channels or images does not fit.
        """
        return self._normalize(x)

    def _normalize(self, x: Any, act: str = "identity") -> Any:
        """See `forward`; if the normalisation of a Tensor is deferred, `act` follows it."""
        follow()
        channels = x.shape[1]
        if channels > self.num_features:
            raise ValueError(f"{type(self).__name__} has {self.num_features} channels, but the input has {channels}")
        if isinstance(x, ConvOutput):
            return Deferred(x.y, *self._scale_shift(x))
        views = self.batch_views
        output = moments_of(x, views, self)
        if output is not None and defers_normalization(x.device):
            return DeferredTensor.of(Deferred(x, *self._scale_shift(output), act))
        x = computed(x)
        self._check_input_dim(x)
        weight, bias = prefixes(self, channels)
        if not views:
            mean, variance = self._stored_statistics(channels)
            return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, self.eps)
        if x.shape[0] % views:  # len() of a tensor is slow
            raise ValueError(
                f"a batch of {len(x)} is not {views} parts of equal size: see activate(views=) and bn_groups"
            )
        if uses_pytorch(x.device) and not (self.changes_moments and torch.is_grad_enabled()):
            return self._eager(x, weight, bias, views)
        y, mean, variance = slim_batch_norm(x, weight, bias, self.eps, views)
        if not self.changes_moments:
            self._observe(mean, variance, self._count(x.shape, views))
            return y
        scale, shift = self._scale_shift(ConvOutput(x, mean, variance))
        shape = len(scale), 1, channels, *(x.ndim - 2) * [1]
        return (x.unflatten(0, (views, -1)) * scale.view(shape) + shift.view(shape)).flatten(0, 1).to(x.dtype)

    def _eager(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, views: int) -> Tensor:
        """Normalise each view by PyTorch's kernels."""
        channels, count = x.shape[1], self._count(x.shape, views)
        tracks = self._tracks(channels)
        plain = self.observer is None and not tracks and not self.changes_moments
        if plain and self.training:
            self.measured.clear()
        if plain and views == 1:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        parts = x.chunk(views) if views > 1 else (x,)  # the gradient of a chunk would be a copy

        def normalize(moments: Iterable[Statistics], training: bool = True, momentum: float = 0.0) -> Tensor:
            y = [
                F.batch_norm(part, mean, variance, weight, bias, training, momentum, self.eps)
                for part, (mean, variance) in zip(parts, moments, strict=True)
            ]
            return y[0] if views == 1 else torch.cat(y)

        if plain:
            return normalize(views * [(None, None)])
        if self.changes_moments:
            moments = [self._moments(part) for part in parts]
            mean, variance = map(torch.stack, zip(*moments, strict=True))
            return normalize(zip(*self._statistics(mean, variance, count), strict=True), training=False)
        if tracks and self.bn_groups == 1 and self.momentum is not None:
            assert self.num_batches_tracked is not None
            self.measured.clear()
            self.num_batches_tracked.add_(views)
            return normalize(views * [(self.running_mean, self.running_var)], momentum=self.momentum)
        scratch = [self._zeros(x) for _ in parts]
        y = normalize(scratch, momentum=1.0)  # which stores the mean and the unbiased variance
        mean, unbiased = map(torch.stack, zip(*scratch, strict=True))
        self._observe(mean, unbiased * ((count - 1) / count), count)
        return y

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance [C] of one view."""
        if x.device.type in ("cpu", "cuda"):  # the devices that have this operation, the fastest
            return torch.batch_norm_update_stats(x, *self._zeros(x), 1.0)
        variance, mean = torch.var_mean(upcast(x), [0, *range(2, x.ndim)], correction=0)
        return mean, variance

    def _zeros(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] for a kernel to write."""
        dtype = upcast(x).dtype if self.weight is None else self.weight.dtype
        return x.new_zeros(x.shape[1], dtype=dtype), x.new_zeros(x.shape[1], dtype=dtype)

    def _scale_shift(self, x: ConvOutput) -> tuple[Tensor, Tensor]:
        """Scale and shift [V, C] of the deferred normalisation; a single row with stored statistics."""
        if x.scale is not None and x.shift is not None:
            self._observe(x.mean, x.variance, self._count(x.shape, len(x.mean)))
            return x.scale, x.shift
        if len(x.mean):
            mean, variance = self._statistics(x.mean, x.variance, self._count(x.shape, len(x.mean)))
        else:
            mean, variance = (upcast(stored)[None] for stored in self._stored_statistics(x.shape[1]))
        return scale_shift(
            mean, variance, self.weight, main_grad(self.weight), self.bias, main_grad(self.bias), self.eps
        )

    @property
    def changes_moments(self) -> bool:
        """Whether `_statistics` returns anything but the moments of this rank's batch."""
        return self._group is not None

    @property
    def _group(self) -> dist.ProcessGroup | None:
        """The ranks to synchronise moments with, if any."""
        return self.process_group if self.observer is None else None

    def _statistics(self, mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Mean and variance [V, C] to normalise by, from a batch's moments [V, C] of `count` values per channel."""
        if self._group is not None:
            mean, variance = _over_ranks(mean, variance, self._group)
            count *= self._group.size()
        self._observe(mean, variance, count)
        return mean, variance

    def _count(self, shape: torch.Size, views: int) -> int:
        """Number of values per channel and view; ValueError in training for one, which has no unbiased variance."""
        count = shape.numel() // (shape[1] * views)
        if count < 2 and self.training:
            raise ValueError(
                f"batch normalisation in training needs at least two values per channel, got {list(shape)}"
            )
        return count

    def _tracks(self, channels: int) -> bool:
        """Whether a batch updates the running statistics: in training, by the full network, without an observer."""
        full = self.active_dn is None and channels == self.num_features
        return self.training and self.track_running_stats and full and self.observer is None

    def _observe(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Call the observer, or update the running statistics once per view if the full network is active."""
        if not self.training:
            return
        self.measured.clear()  # stale once training changes the weights
        if self.observer is not None:
            with torch.no_grad():
                self.observer(mean, variance, count)
        elif self._tracks(mean.shape[1]):
            self._track(mean, variance, count)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Update the running statistics once per view."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        unbiased = variance * (count / (count - 1))
        if self.bn_groups > 1:
            mean, unbiased = (moments.unflatten(0, (-1, self.bn_groups)).mean(1) for moments in (mean, unbiased))
        for view_mean, view_variance in zip(mean.unbind(), unbiased.unbind(), strict=True):
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(view_mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(view_variance.to(self.running_var.dtype), momentum)

    def _stored_statistics(self, channels: int) -> tuple[Tensor, Tensor]:
        mean, variance = self.evaluation_statistics()
        if len(mean) != channels:
            raise ValueError(
                f"the statistics have {len(mean)} channels, but the input has {channels}: "
                "call activate(model, dn) for the subnet first"
            )
        return mean, variance


def _over_ranks(mean: Tensor, variance: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Moments of the union of the ranks' batches, which have equal size, by two all-reduces; differentiable."""
    total_mean = _Sum.apply(mean, group) / group.size()
    return total_mean, _Sum.apply(variance + (mean - total_mean).square(), group) / group.size()


class _Sum(torch.autograd.Function):
    """Sum over ranks. Every rank's loss depends on every rank's term, so the backward pass sums the gradients too."""

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
    """`torch.nn.BatchNorm2d` over the first C of `num_features` channels of [N, C, H, W].

    The constructor takes the arguments of `torch.nn.BatchNorm2d`; `num_features` is that of the full network.

    Example:
        >>> norm = SlimBatchNorm2d(16)
        >>> norm(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])
    """


class SlimBatchNorm1d(SlimBatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` over the first C of `num_features` features of [N, C] or [N, C, L].

    The constructor takes the arguments of `torch.nn.BatchNorm1d`; `num_features` is that of the full network.

    Example:
        >>> norm = SlimBatchNorm1d(16)
        >>> norm(torch.randn(4, 8)).shape
        torch.Size([4, 8])
    """


class MomentumBatchNorm(SlimBatchNorm):
    """Batch normalisation with momentum statistics, for the target network (Momentum^2 Teacher, Li et al. 2021).

    View v with mean m_v and unbiased variance s_v is normalised with

        mu = alpha m_v + (1 - alpha) M        var = alpha s_v + (1 - alpha) V

    and after all views of a batch  M <- alpha mean_v(m_v) + (1 - alpha) M, and V likewise from s_v. M and V are the
    buffers `running_mean` and `running_var`; `num_batches_tracked` counts batches. The layer is not slimmable, because
    the target is always the full network.

    Attributes:
        alpha: weight of the batch's moments, from 1 at the start of a training run to 0 at its end; a number or a
            scalar tensor on the layer's device. Set it with `configure_batch_norm`.
        double_correction: multiply the variance by n / (n - 1) a second time, as the published code does.
    """

    alpha: float | Tensor = 1.0
    double_correction: bool = False
    _earlier: Sequence[tuple[Tensor, Tensor]] = ()  # moments [V, C] of the batch's earlier views

    @property
    def changes_moments(self) -> bool:
        return True

    def _count(self, shape: torch.Size, views: int) -> int:
        if shape[1] != self.num_features:
            raise ValueError(
                f"momentum batch normalisation is not slimmable: the input must have {self.num_features} channels, "
                f"got {shape[1]}"
            )
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
        if self.view is not None:  # the statistics change after the last view
            self._earlier = [*self._earlier[: self.view], (mean, variance)]
            if self.view + 1 < self.views:
                return blended
            mean, variance = map(torch.cat, zip(*self._earlier, strict=True))
            self._earlier = ()
        self.running_mean.lerp_(mean.mean(0), alpha)
        self.running_var.lerp_(variance.mean(0), alpha)
        self.num_batches_tracked.add_(1)
        return blended


class MomentumBatchNorm2d(MomentumBatchNorm, nn.BatchNorm2d):
    """`MomentumBatchNorm` of [N, C, H, W].

    Example:
        >>> norm = MomentumBatchNorm2d(8)
        >>> norm(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])
    """


class MomentumBatchNorm1d(MomentumBatchNorm, nn.BatchNorm1d):
    """`MomentumBatchNorm` of [N, C] or [N, C, L].

    Example:
        >>> norm = MomentumBatchNorm1d(8)
        >>> norm(torch.randn(4, 8)).shape
        torch.Size([4, 8])
    """


class BatchNormSettings(TypedDict, total=False):
    """Settings of `configure_batch_norm`: the attributes of the same names."""

    bn_groups: int
    process_group: dist.ProcessGroup | None
    view: int | None
    alpha: float | Tensor


def configure_batch_norm(
    model: nn.Module | Iterable[nn.Module], **settings: Unpack[BatchNormSettings]
) -> AttributeChanges:
    """Set attributes of all slimmable batch normalisation layers in a model: permanently, or inside a `with` block
    only.

    Args:
        model: any module, or modules, of which those of other kinds are left as they are.
        settings: `bn_groups`, `process_group` and `view` for all layers, `alpha` for momentum batch normalisation, as
            documented at `SlimBatchNorm` and `MomentumBatchNorm`. Attributes not named here keep their values.

    Returns:
        A context manager that restores the previous values on exit.

    Example:
        >>> norm = SlimBatchNorm2d(16)
        >>> with configure_batch_norm(norm, bn_groups=2):
        ...     norm.bn_groups
        2
    """
    changes = AttributeChanges()
    for module in model.modules() if isinstance(model, nn.Module) else model:
        if isinstance(module, SlimBatchNorm):
            for name, value in settings.items():
                if name != "alpha" or isinstance(module, MomentumBatchNorm):
                    changes.set(module, name, value)
    return changes
