"""Batch normalisation over a prefix of the channels, with statistics per view and per subnet.

Affine parameters are shared by all subnets. Running statistics belong to the full network alone: an average over
subnets would describe none of them. A subnet is evaluated with statistics measured for it (`dspnet_fast.statistics`),
kept by its name, since subnets of different widths can share a layer's channel count.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [C] and unbiased variance [C] of [N, C, ...], in float32 at least; needs two values per channel.

    Taken from batch normalisation itself, which on a CPU finds them five times as fast as torch.var_mean does.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, variance = x.new_zeros(x.shape[1], dtype=dtype), x.new_zeros(x.shape[1], dtype=dtype)
    F.batch_norm(x, mean, variance, training=True, momentum=1.0)
    return mean, variance


class SlimBatchNorm(_BatchNorm):
    """What SlimBatchNorm1d and SlimBatchNorm2d share; the number of channels is taken from the input."""

    active_dn: str | None = None  # None: the full network
    views: int = 1

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

    def _apply(self, fn, recurse: bool = True):
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

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [N, C, ...] per channel: by each view's own batch in training, by kept statistics otherwise."""
        self._check_input_dim(x)
        channels = x.shape[1]
        if channels > self.num_features:
            raise ValueError(f"{type(self).__name__} has {self.num_features} channels, the input has {channels}")
        weight = None if self.weight is None else self.weight[:channels]
        bias = None if self.bias is None else self.bias[:channels]
        if self.training:
            self.measured.clear()  # they described weights that training is about to change
            if x.shape[0] % self.views:
                raise ValueError(f"a batch of {x.shape[0]} is not {self.views} views of equal size")
            views = [self._normalize_view(view, weight, bias) for view in x.chunk(self.views)]
            return views[0] if self.views == 1 else torch.cat(views)
        if not self.track_running_stats and self.active_dn not in self.measured:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        mean, variance = self.evaluation_statistics()
        if len(mean) != channels:
            raise ValueError(
                f"statistics of {len(mean)} channels for an input of {channels}: activate(model, dn) the subnet first"
            )
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, self.eps)

    def _normalize_view(self, view: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Normalise one view by its own mean and biased variance, as torch.nn.BatchNorm2d does in training."""
        track = self.track_running_stats and self.active_dn is None and view.shape[1] == self.num_features
        if not track:
            return F.batch_norm(view, None, None, weight, bias, True, 0.0, self.eps)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        return F.batch_norm(view, self.running_mean, self.running_var, weight, bias, True, momentum, self.eps)


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
    training run and is set from outside (`set_alpha`). It is not slimmable: the target is always the full network.
    With `double_correction` the variance is multiplied by n / (n - 1) a second time, as the published code does.
    """

    alpha: float = 1.0
    double_correction: bool = False

    def _normalize_all(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        count = x.numel() // (x.shape[1] * self.views)
        if count < 2:
            raise ValueError("an unbiased variance needs at least two values per channel and view")
        moments = [batch_moments(view) for view in x.detach().chunk(self.views)]
        if self.double_correction:
            moments = [(mean, variance * (count / (count - 1))) for mean, variance in moments]
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        normalized = [
            F.batch_norm(
                view,
                torch.lerp(self.running_mean, mean.to(self.running_mean.dtype), self.alpha),
                torch.lerp(self.running_var, variance.to(self.running_var.dtype), self.alpha),
                weight,
                bias,
                False,
                0.0,
                self.eps,
            )
            for view, (mean, variance) in zip(x.chunk(self.views), moments, strict=True)
        ]
        for index, kept in enumerate((self.running_mean, self.running_var)):
            kept.lerp_(torch.stack([moment[index] for moment in moments]).mean(0).to(kept.dtype), self.alpha)
        self.num_batches_tracked.add_(1)
        return normalized[0] if self.views == 1 else torch.cat(normalized)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [N, C, ...]: by the blend of batch and momentum statistics in training, by the kept ones else."""
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        if x.shape[1] != self.num_features:
            raise ValueError(f"momentum batch normalisation of {self.num_features} channels is not slimmable")
        return self._normalize_all(x, self.weight, self.bias)


class MomentumBatchNorm2d(MomentumBatchNorm, nn.BatchNorm2d):
    """`MomentumBatchNorm` of [N, C, H, W]."""


class MomentumBatchNorm1d(MomentumBatchNorm, nn.BatchNorm1d):
    """`MomentumBatchNorm` of [N, C] or [N, C, L]."""
