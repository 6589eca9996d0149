"""2-d convolution with a prefix of the weight's input and output channels."""

from typing import Any, overload

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import conv_moments, conv_norm, slim_conv2d, slim_linear
from ..ops.autocast import is_autocasting
from ..ops.registry import defers_normalization, uses_pytorch
from .batch_norm import SlimBatchNorm
from .deferred import ConvOutput, Deferred
from .deferred_tensor import attach_moments, computed, device_of, loaded
from .prefix import HALF, prefixes
from .recomputation import follow
from .sized import Sized, main_grad


class SlimConv2d(Sized, nn.Conv2d):
    """`torch.nn.Conv2d` that uses the prefix `weight[:size, :C]` for an input of C channels.

    A grouped convolution keeps its channels per group and uses as many groups as the input has, so `size` has no
    effect on it; in a depthwise convolution the outputs are as many as the inputs.

    The constructor takes the arguments of `torch.nn.Conv2d`; `in_channels` and `out_channels` are those of the full
    network.

    Attributes:
        norm: the batch normalisation of the output, set by `fused`; None if the output has another use.

    Example:
        >>> conv = SlimConv2d(16, 32, kernel_size=3, padding=1)
        >>> conv(torch.randn(2, 8, 10, 10)).shape
        torch.Size([2, 32, 10, 10])
    """

    norm: SlimBatchNorm | None = None

    @property
    def full_size(self) -> int:
        """Output channels."""
        return self.out_channels

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Deferred, views: int, norm: SlimBatchNorm | None = None) -> ConvOutput: ...

    def forward(self, x: Any, views: int = 0, norm: SlimBatchNorm | None = None) -> Any:
        """Convolve with the active prefix of the weight.

        Args:
            x: a Tensor [N, C, H, W] or [C, H, W], C at most `in_channels`, or a `Deferred`; also [N, C], maps of one
                pixel, for an ungrouped 1 x 1 kernel.
            views: number of views to compute the output's moments of; for a `Deferred` only.
            norm: the batch normalisation of the output, whose scale and shift the call may compute; for a `Deferred`
                only.

        Returns:
            A Tensor [N, size, H', W'], or a `ConvOutput` of this shape for a `Deferred`; [N, size] for [N, C].

        Raises:
            ValueError: if the input has more than `in_channels` channels or ends within a group, or if the layer does
                not support a `Deferred`.
        """
        if self.norm is not None and not isinstance(x, Deferred) and defers_normalization(device_of(x)):
            follow()
            deferred = loaded(x)
            if deferred.x.ndim == 4:
                groups, out_channels = self._active(deferred.x.shape[1])
                views = self.norm.batch_views
                return attach_moments(self._conv_moments(deferred, out_channels, groups, views, self.norm), self.norm)
        if len(x.shape) == 3:
            return self.forward(x[None])[0]
        groups, out_channels = self._active(x.shape[1])
        if len(x.shape) == 2 and self._is_product:
            return self._product(computed(x), out_channels)
        if isinstance(x, Deferred):
            return self._conv_moments(x, out_channels, groups, views, norm)
        x = computed(x)
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=mode)
            padding = (0, 0)
        if self._is_product and x.shape[2:].numel() == 1:
            y = self._product(x.flatten(1), out_channels)
            return y.view(*y.shape, 1, 1)
        device, dtype = x.device, x.dtype
        if uses_pytorch(device):
            if groups > 1 and dtype in HALF and device.type == "cpu":
                x = x.float()  # backward passes of grouped convolutions in 16 bits are several times slower
            weight, bias = prefixes(self, out_channels, x.shape[1] // groups, like=x)
            if x.dtype != dtype:  # the weights may have 16 bits too
                weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
            y = F.conv2d(x, weight, bias, self.stride, padding, self.dilation, groups)
            return y if y.dtype == dtype or is_autocasting(device) else y.to(dtype)
        bias = None if self.bias is None else self.bias[:out_channels]
        grad = main_grad(self.weight)
        return slim_conv2d(x, self.weight, bias, grad, out_channels, self.stride, padding, self.dilation, groups)

    @property
    def _is_product(self) -> bool:
        """Whether the convolution of a pixel is a product of matrices."""
        return self.kernel_size == (1, 1) and self.groups == 1 and self.padding in ((0, 0), "valid", "same")

    def _product(self, x: Tensor, out_channels: int) -> Tensor:
        """The convolution of maps of one pixel, [N, C] -> [N, out_channels], as in squeeze-and-excite."""
        if uses_pytorch(x.device):
            weight, bias = prefixes(self, out_channels, x.shape[1], like=x)
            return F.linear(x, weight.flatten(1), bias)
        bias = None if self.bias is None else self.bias[:out_channels]
        return slim_linear(x, self.weight, bias, main_grad(self.weight), out_channels)

    def _active(self, channels: int) -> tuple[int, int]:
        """Groups and output channels for `channels` input channels."""
        if channels > self.in_channels:
            raise ValueError(f"SlimConv2d has {self.in_channels} input channels, but the input has {channels}")
        if self.groups == 1:
            return 1, self.size
        group_channels = self.in_channels // self.groups
        groups, rest = divmod(channels, group_channels)
        if rest:
            raise ValueError(f"an input of {channels} channels is not a whole number of groups of {group_channels}")
        return groups, groups * (self.out_channels // self.groups)

    def _conv_moments(
        self, x: Deferred, out_channels: int, groups: int, views: int, norm: SlimBatchNorm | None
    ) -> ConvOutput:
        if not has_moments(self):
            raise ValueError(f"conv_moments does not support {self}: materialize its input first")
        weight, stride, padding = self.weight, self.stride[0], self.padding[0]
        geometry = out_channels, stride, padding, groups, views
        arguments: tuple[Any, ...] = x.x, x.scale, x.shift, x.act, x.gate, weight, main_grad(weight), *geometry
        if norm is not None and norm.uses_moments_of(out_channels):
            gamma, beta = norm.weight, norm.bias
            arguments = *arguments, gamma, main_grad(gamma), beta, main_grad(beta), norm.eps
            y, *rows, mean, variance = conv_norm(*arguments)
            return ConvOutput(y, mean, variance, *rows)
        return ConvOutput(*conv_moments(*arguments))


def has_moments(conv: nn.Conv2d) -> bool:
    """Whether the operator `conv_moments` supports a convolution."""
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros" or conv.bias is not None:
        return False
    for height, width in (conv.kernel_size, conv.stride, conv.padding):  # in every call: not all(...) of a generator
        if height != width:
            return False
    is_depthwise = conv.groups == conv.in_channels == conv.out_channels
    return conv.dilation == (1, 1) and (conv.groups == 1 or is_depthwise)
