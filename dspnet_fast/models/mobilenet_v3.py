"""Slimmable MobileNetV3-Large (Howard et al. 2019), a family over widths, with timm's names and channels.

A subnet's channels follow from its width w: every stage has make_divisible(w x full channels), and the expanded and
squeezed channels of a block follow from its input channels. Below w = 0.75 the stem keeps 16 channels, so each subnet
is the network that timm builds with that channel multiplier.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..nn import SlimBatchNorm2d, SlimConv2d
from ..nn.activate import Sizes
from ..nn.deferred import Activation
from ..nn.functional import conv_norm_act, gated, materialize, pool
from ..subnets import Subnet, make_divisible, width_name
from .initialize import initialize
from .network import Network

STEM_CHANNELS = 16


@dataclass(frozen=True)
class Block:
    """One row of the paper's table 1: expansion ratio, depthwise kernel, stride, squeeze-and-excite, activation."""

    expand: float
    kernel: int
    stride: int
    squeeze: bool
    act: Callable[[], nn.Module]


@dataclass(frozen=True)
class Stage:
    """Blocks with the same number of output channels."""

    channels: int
    blocks: tuple[Block, ...]


RE, HS = partial(nn.ReLU, inplace=True), nn.Hardswish  # in-place hardswish would clone its input for the gradient
STAGES = (
    Stage(16, (Block(1, 3, 1, False, RE),)),
    Stage(24, (Block(4, 3, 2, False, RE), Block(3, 3, 1, False, RE))),
    Stage(40, (Block(3, 5, 2, True, RE),) + 2 * (Block(3, 5, 1, True, RE),)),
    Stage(80, (Block(6, 3, 2, False, HS), Block(2.5, 3, 1, False, HS)) + 2 * (Block(2.3, 3, 1, False, HS),)),
    Stage(112, 2 * (Block(6, 3, 1, True, HS),)),
    Stage(160, (Block(6, 5, 2, True, HS),) + 2 * (Block(6, 5, 1, True, HS),)),
)
FEATURE_CHANNELS = 960
LAST_OF_RESOLUTION = (1, 2, 4, 6)  # stages; 6 is the feature convolution


class SqueezeExcite(nn.Module):
    """Gate each channel by a small network on its mean: x * hardsigmoid(W2 relu(W1 mean(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        sizes = self.layer_sizes(channels)
        self.conv_reduce = SlimConv2d(channels, sizes["conv_reduce"], 1)
        self.act1 = nn.ReLU(inplace=True)
        self.conv_expand = SlimConv2d(sizes["conv_reduce"], channels, 1)

    @staticmethod
    def layer_sizes(channels: int) -> dict[str, int]:
        """Output channels of the convolutions, to gate `channels` channels."""
        return {"conv_reduce": make_divisible(channels / 4), "conv_expand": channels}

    def forward(self, x: Activation) -> Activation:
        """Gate [N, C, H, W]."""
        pooled = pool(x)
        if not isinstance(self.conv_reduce, SlimConv2d):  # nn.Conv2d does not take [N, C]
            pooled = pooled[:, :, None, None]
        gate = self.conv_expand(self.act1(self.conv_reduce(pooled)))
        return gated(x, F.hardsigmoid(gate.flatten(1)))


class DepthwiseSeparable(nn.Module):
    """Depthwise convolution, then pointwise without activation; residual if input and output have one shape."""

    def __init__(self, in_channels: int, out_channels: int, block: Block) -> None:
        super().__init__()
        self.stride = block.stride
        padding = block.kernel // 2
        self.conv_dw = SlimConv2d(
            in_channels, in_channels, block.kernel, block.stride, padding, groups=in_channels, bias=False
        )
        self.bn1 = SlimBatchNorm2d(in_channels)
        self.act1 = block.act()
        self.conv_pw = SlimConv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = SlimBatchNorm2d(out_channels)

    @staticmethod
    def layer_sizes(in_channels: int, out_channels: int, block: Block) -> dict[str, int]:
        """Output channels of the convolutions, by name."""
        return {"conv_pw": out_channels}

    def forward(self, x: Activation) -> Activation:
        """Map [N, C, H, W] to [N, C', H', W']."""
        y = conv_norm_act(x, self.conv_dw, self.bn1, self.act1)
        y = conv_norm_act(y, self.conv_pw, self.bn2)
        return materialize(y, x, inplace=True) if self.stride == 1 and x.shape[1] == y.shape[1] else y


class InvertedResidual(nn.Module):
    """Pointwise expansion, depthwise, squeeze-and-excite, projection; residual if input and output have one shape."""

    def __init__(self, in_channels: int, out_channels: int, block: Block) -> None:
        super().__init__()
        self.stride = block.stride
        mid = self.layer_sizes(in_channels, out_channels, block)["conv_pw"]
        padding = block.kernel // 2
        self.conv_pw = SlimConv2d(in_channels, mid, 1, bias=False)
        self.bn1 = SlimBatchNorm2d(mid)
        self.act1 = block.act()
        self.conv_dw = SlimConv2d(mid, mid, block.kernel, block.stride, padding, groups=mid, bias=False)
        self.bn2 = SlimBatchNorm2d(mid)
        self.act2 = block.act()
        self.se = SqueezeExcite(mid) if block.squeeze else nn.Identity()
        self.conv_pwl = SlimConv2d(mid, out_channels, 1, bias=False)
        self.bn3 = SlimBatchNorm2d(out_channels)

    @staticmethod
    def layer_sizes(in_channels: int, out_channels: int, block: Block) -> dict[str, int]:
        """Output channels of the convolutions, by name."""
        mid = make_divisible(in_channels * block.expand)
        squeeze = {f"se.{name}": size for name, size in SqueezeExcite.layer_sizes(mid).items()} if block.squeeze else {}
        return {"conv_pw": mid, **squeeze, "conv_pwl": out_channels}

    def forward(self, x: Activation) -> Activation:
        """Map [N, C, H, W] to [N, C', H', W']."""
        y = conv_norm_act(x, self.conv_pw, self.bn1, self.act1)
        y = self.se(conv_norm_act(y, self.conv_dw, self.bn2, self.act2))
        y = conv_norm_act(y, self.conv_pwl, self.bn3)
        return materialize(y, x, inplace=True) if self.stride == 1 and x.shape[1] == y.shape[1] else y


class Feature(nn.Module):
    """The last pointwise convolution, whose pooled output is the features."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = SlimConv2d(in_channels, out_channels, 1, bias=False)
        self.bn1 = SlimBatchNorm2d(out_channels)
        self.act1 = nn.Hardswish()

    def forward(self, x: Activation) -> Activation:
        """Map [N, C, H, W] to [N, C', H, W]."""
        return conv_norm_act(x, self.conv, self.bn1, self.act1)


def _block_type(stage: int) -> type[DepthwiseSeparable] | type[InvertedResidual]:
    return DepthwiseSeparable if stage == 0 else InvertedResidual


class MobileNetV3(Network):
    """Images [N, C, H, W] to pooled features [N, F], F = 960 x width.

    Args:
        full: the largest subnet, for which weights are allocated.
        small_stem: stride 1 instead of 2 in the first convolution.
        in_channels: channels C of the images.
    """

    name = "mobilenet_v3_large"
    head_name = "classifier"
    stages = tuple(f"blocks.{index}" for index in range(len(STAGES) + 1))

    def __init__(self, full: Subnet, small_stem: bool = False, in_channels: int = 3) -> None:
        super().__init__(full, small_stem, in_channels)
        stem, *stages, feature = full.channels
        self.conv_stem = SlimConv2d(in_channels, stem, 3, 1 if small_stem else 2, 1, bias=False)
        self.bn1 = SlimBatchNorm2d(stem)
        self.act1 = nn.Hardswish()
        self.blocks = nn.Sequential()
        in_channels = stem
        for index, (stage, channels) in enumerate(zip(STAGES, stages, strict=True)):
            blocks = nn.Sequential()
            for block in stage.blocks:
                blocks.append(_block_type(index)(in_channels, channels, block))
                in_channels = channels
            self.blocks.append(blocks)
        self.blocks.append(nn.Sequential(Feature(in_channels, feature)))
        initialize(self)

    @staticmethod
    def subnet(name: str) -> Subnet:
        """The subnet of a width multiplier: "w0.50" has half of the channels."""
        match = re.fullmatch(r"w(\d*\.?\d+)", name)
        width = float(match.group(1)) if match else 0.0
        if width <= 0:
            raise InputError(
                f"{name!r} is not a MobileNetV3 subnet: they are named by width, for example w0.50 or w1.00"
            )
        stem = STEM_CHANNELS if width < 0.75 else make_divisible(STEM_CHANNELS * width)
        channels = [make_divisible(stage.channels * width) for stage in STAGES]
        return Subnet(
            width_name(width),
            (stem, *channels, make_divisible(FEATURE_CHANNELS * width)),
            (*(len(stage.blocks) for stage in STAGES), 1),
        )

    def layer_sizes(self, dn: Subnet | str) -> tuple[str, Sizes]:
        subnet = self.subnet(dn) if isinstance(dn, str) else dn
        stem, *stages, feature = subnet.channels
        sizes = {"conv_stem": stem}
        in_channels = stem
        for index, (stage, channels) in enumerate(zip(STAGES, stages, strict=True)):
            for position, block in enumerate(stage.blocks):
                layer_sizes = _block_type(index).layer_sizes(in_channels, channels, block)
                sizes |= {f"blocks.{index}.{position}.{name}": size for name, size in layer_sizes.items()}
                in_channels = channels
        sizes[f"blocks.{len(STAGES)}.0.conv"] = feature
        return subnet.name, sizes

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] to features [N, F]."""
        return pool(self._last_map(x))

    def forward_dense(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self._last_map(x)
        return pool(y), materialize(y)

    def _last_map(self, x: Tensor) -> Activation:
        return self.blocks(conv_norm_act(x, self.conv_stem, self.bn1, self.act1))

    @property
    def map_channels(self) -> tuple[int, int, int, int]:
        first, second, third, fourth = (self.full.channels[stage + 1] for stage in LAST_OF_RESOLUTION)
        return first, second, third, fourth

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        y: Activation = conv_norm_act(x, self.conv_stem, self.bn1, self.act1)
        maps = []
        for index, stage in enumerate(self.blocks):
            y = stage(y)
            if index in LAST_OF_RESOLUTION:
                y = materialize(y)
                maps.append(y)
        return maps
