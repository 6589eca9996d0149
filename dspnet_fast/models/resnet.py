"""Slimmable ResNet of basic blocks (He et al. 2016), a family over widths and depths, with the names of timm and
torchvision.

`c64-d2222` has stages of 64, 128, 256, 512 channels and 2, 2, 2, 2 blocks: ResNet-18.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from ..errors import InputError
from ..nn import SlimBatchNorm2d, SlimConv2d, SlimSequential
from ..nn.activate import Sizes
from ..nn.functional import conv_norm_act, materialize, pool
from ..subnets import Subnet
from .initialize import initialize
from .network import Network

STAGE_MULTIPLIERS = (1, 2, 4, 8)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual, with a strided 1x1 convolution where the shapes differ."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = SlimConv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = SlimBatchNorm2d(out_channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = SlimConv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = SlimBatchNorm2d(out_channels)
        self.downsample = (
            nn.Sequential(SlimConv2d(in_channels, out_channels, 1, stride, bias=False), SlimBatchNorm2d(out_channels))
            if stride != 1 or in_channels != out_channels
            else None
        )
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C', H', W']."""
        y = conv_norm_act(x, self.conv1, self.bn1, self.act1)
        y = conv_norm_act(y, self.conv2, self.bn2)
        shortcut = x if self.downsample is None else conv_norm_act(x, *self.downsample)
        return materialize(y, shortcut, self.act2, inplace=True)


class ResNet(Network):
    """Images [N, C, H, W] to pooled features [N, F], F = 8 x channels of the first stage.

    Args:
        full: the largest subnet, for which weights are allocated.
        small_stem: a 3x3 convolution of stride 1 without pooling, instead of 7x7 of stride 2 with max pooling.
        in_channels: channels C of the images.
    """

    name = "resnet"
    head_name = "fc"
    dense = True
    stages = ("layer1", "layer2", "layer3", "layer4")

    def __init__(self, full: Subnet, small_stem: bool = False, in_channels: int = 3) -> None:
        super().__init__(full, small_stem, in_channels)
        stem, *stages = full.channels
        if small_stem:
            self.conv1 = SlimConv2d(in_channels, stem, 3, 1, 1, bias=False)
        else:
            self.conv1 = SlimConv2d(in_channels, stem, 7, 2, 3, bias=False)
        self.bn1 = SlimBatchNorm2d(stem)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, 2, 1)
        in_channels = stem
        for index, (channels, depth) in enumerate(zip(stages, full.depths, strict=True), 1):
            blocks = SlimSequential()
            for position in range(depth):
                blocks.append(BasicBlock(in_channels, channels, 2 if index > 1 and position == 0 else 1))
                in_channels = channels
            setattr(self, f"layer{index}", blocks)
        initialize(self)

    @staticmethod
    def subnet(name: str) -> Subnet:
        """The subnet "c<channels of stage 1>-d<blocks per stage>"; depths above 9 are written d3.4.23.3."""
        match = re.fullmatch(r"c([1-9]\d*)-d([1-9]{4}|(?:[1-9]\d*\.){3}[1-9]\d*)", name)
        if not match:
            raise InputError(
                f"{name!r} is not a ResNet subnet: they are named by channels and blocks, for example c64-d2222"
            )
        base, depths = int(match.group(1)), match.group(2)
        blocks = tuple(int(depth) for depth in (depths.split(".") if "." in depths else depths))
        return Subnet(name, (base, *(base * factor for factor in STAGE_MULTIPLIERS)), blocks)

    def layer_sizes(self, dn: Subnet | str) -> tuple[str, Sizes]:
        subnet = self.subnet(dn) if isinstance(dn, str) else dn
        stem, *stages = subnet.channels
        sizes = {"conv1": stem}
        for index, (channels, depth) in enumerate(zip(stages, subnet.depths, strict=True), 1):
            sizes[f"layer{index}"] = depth
            for position, block in enumerate(getattr(self, f"layer{index}")):
                convolutions = ["conv1", "conv2"] + ([] if block.downsample is None else ["downsample.0"])
                sizes |= {f"layer{index}.{position}.{convolution}": channels for convolution in convolutions}
        return subnet.name, sizes

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] to features [N, F]."""
        return self.forward_dense(x)[0]

    def forward_dense(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.feature_maps(x)[-1]
        return pool(y), y

    @property
    def map_channels(self) -> tuple[int, int, int, int]:
        _, first, second, third, fourth = self.full.channels
        return first, second, third, fourth

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(materialize(conv_norm_act(x, self.conv1, self.bn1, self.act1)))
        maps = []
        for index in range(1, len(STAGE_MULTIPLIERS) + 1):
            x = self.get_submodule(f"layer{index}")(x)
            maps.append(x)
        return maps
