"""2-d convolution whose input and output channels are prefixes of the weight's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sized import Sized


class SlimConv2d(Sized, nn.Conv2d):
    """`torch.nn.Conv2d` that uses `weight[:size, :input channels]`.

    Input [N, C, H, W] with C at most `in_channels`; output [N, size, H', W'].
    A grouped convolution keeps its channels per group and drops whole groups, so its output follows its input
    (depthwise is the case of one channel per group) and its `size` is not used.

    Raises ValueError for an input with more channels than `in_channels`, or one that cuts a group in two.
    """

    @property
    def full_size(self) -> int:
        """Output channels."""
        return self.out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [N, C, H, W] with the active prefix of the weight."""
        channels = x.shape[-3]
        if channels > self.in_channels:
            raise ValueError(f"SlimConv2d has {self.in_channels} input channels, the input has {channels}")
        if self.groups == 1:
            groups, out_channels, group_channels = 1, self.size, channels
        else:
            group_channels = self.in_channels // self.groups
            groups, rest = divmod(channels, group_channels)
            if rest:
                raise ValueError(f"an input of {channels} channels cuts a group of {group_channels} in two")
            out_channels = groups * (self.out_channels // self.groups)
        weight = self.weight[:out_channels, :group_channels]
        bias = None if self.bias is None else self.bias[:out_channels]
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return torch.conv2d(x, weight, bias, self.stride, padding, self.dilation, groups)
