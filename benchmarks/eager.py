"""The baseline: DSPNet's training step in plain PyTorch, written like published slimmable networks.

Functional networks slice full weights, `weight[:o, :i]`, and call F.batch_norm for each view. Every subnet has its own
backward pass. LARS and the target's update loop over parameters. Definitions of subnets (`layer_sizes`) and parameter
names come from train/. The step is the same (tests/benchmarks/test_eager.py), except that running statistics are not
updated, which favours the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dspnet_fast.subnets import Subnet
from train.pretraining.dspnet import DSPNet

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

RELU_STAGES, STAGE_STRIDES = 3, (1, 2, 2, 2, 1, 2)  # MobileNetV3-Large uses hardswish from the fourth stage on


@dataclass(frozen=True)
class Layers:
    """The layers of a subnet, called by name.

    Args:
        weights: parameters of the full network.
        sizes: output channels or numbers of blocks of the subnet.
        views: number of views in a batch, one after another; batch norm normalises each separately.
    """

    weights: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    views: int = 1

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """A dense convolution, padded to keep the size."""
        out_channels = self.sizes[name]
        weight, bias = self.weights[f"{name}.weight"][:out_channels, : x.shape[1]], self.weights.get(f"{name}.bias")
        return F.conv2d(x, weight, None if bias is None else bias[:out_channels], stride, weight.shape[-1] // 2)

    def depthwise(self, name: str, x: Tensor, stride: int) -> Tensor:
        """A depthwise convolution."""
        channels = x.shape[1]
        weight = self.weights[f"{name}.weight"][:channels]
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, channels)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Batch normalisation in training mode."""
        channels = x.shape[1]
        weight, bias = self.weights[f"{name}.weight"][:channels], self.weights[f"{name}.bias"][:channels]
        views = [F.batch_norm(view, None, None, weight, bias, True) for view in x.chunk(self.views)]
        return views[0] if self.views == 1 else torch.cat(views)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """A linear layer, for inputs with a prefix of its features."""
        return F.linear(x, self.weights[f"{name}.weight"][:, : x.shape[1]], self.weights.get(f"{name}.bias"))

    def has(self, name: str) -> bool:
        """Whether the full network has a layer of this name."""
        return f"{name}.weight" in self.weights


def mobilenet_v3_large(layers: Layers, x: Tensor, small_stem: bool) -> Tensor:
    """[N, 3, H, W] -> [N, features]."""
    x = F.hardswish(layers.norm("encoder.bn1", layers.conv("encoder.conv_stem", x, 1 if small_stem else 2)), True)
    for stage, first_stride in enumerate(STAGE_STRIDES):
        act = F.relu if stage < RELU_STAGES else F.hardswish
        position = 0
        while layers.has(f"encoder.blocks.{stage}.{position}.conv_dw"):
            x = _mobile_block(layers, f"encoder.blocks.{stage}.{position}", x, 1 if position else first_stride, act)
            position += 1
    name = f"encoder.blocks.{len(STAGE_STRIDES)}.0"
    return F.hardswish(layers.norm(f"{name}.bn1", layers.conv(f"{name}.conv", x)), True).mean((2, 3))


def _mobile_block(layers: Layers, name: str, x: Tensor, stride: int, act: Callable[..., Tensor]) -> Tensor:
    y, norms = x, iter((f"{name}.bn1", f"{name}.bn2", f"{name}.bn3"))
    project = f"{name}.conv_pw"
    if layers.has(f"{name}.conv_pwl"):
        y = act(layers.norm(next(norms), layers.conv(project, y)), inplace=True)
        project = f"{name}.conv_pwl"
    y = act(layers.norm(next(norms), layers.depthwise(f"{name}.conv_dw", y, stride)), inplace=True)
    if layers.has(f"{name}.se.conv_reduce"):
        gate = F.relu(layers.conv(f"{name}.se.conv_reduce", y.mean((2, 3), keepdim=True)), inplace=True)
        y = y * F.hardsigmoid(layers.conv(f"{name}.se.conv_expand", gate))
    y = layers.norm(next(norms), layers.conv(project, y))
    return x + y if stride == 1 and x.shape[1] == y.shape[1] else y


def resnet(layers: Layers, x: Tensor, small_stem: bool) -> Tensor:
    """[N, 3, H, W] -> [N, features]."""
    x = F.relu(layers.norm("encoder.bn1", layers.conv("encoder.conv1", x, 1 if small_stem else 2)), inplace=True)
    if not small_stem:
        x = F.max_pool2d(x, 3, 2, 1)
    for stage in range(1, 5):
        for position in range(layers.sizes[f"encoder.layer{stage}"]):
            stride = 2 if stage > 1 and position == 0 else 1
            x = _basic_block(layers, f"encoder.layer{stage}.{position}", x, stride)
    return x.mean((2, 3))


def _basic_block(layers: Layers, name: str, x: Tensor, stride: int) -> Tensor:
    y = F.relu(layers.norm(f"{name}.bn1", layers.conv(f"{name}.conv1", x, stride)), inplace=True)
    y = layers.norm(f"{name}.bn2", layers.conv(f"{name}.conv2", y))
    if layers.has(f"{name}.downsample.0"):
        x = layers.norm(f"{name}.downsample.1", layers.conv(f"{name}.downsample.0", x, stride))
    return F.relu(y + x, inplace=True)


ENCODERS = {"mobilenet_v3_large": mobilenet_v3_large, "resnet": resnet}


def mlp(layers: Layers, name: str, x: Tensor) -> Tensor:
    """Linear - BN - ReLU - Linear."""
    return layers.linear(f"{name}.fc2", F.relu(layers.norm(f"{name}.bn1", layers.linear(f"{name}.fc1", x)), True))


def regression(p: Tensor, z: Tensor) -> Tensor:
    """Mean of 2 - 2 cos(p, z), at least in fp32."""
    p, z = (v if v.dtype == torch.float64 else v.float() for v in (p, z))
    return (2 - 2 * (F.normalize(p) * F.normalize(z)).sum(1)).mean()


@torch.no_grad()
def lars(
    parameters: Mapping[str, Tensor],
    momenta: Mapping[str, Tensor],
    lr: float,
    *,
    weight_decay: float,
    momentum: float,
    eta: float,
) -> None:
    """LARS in a loop over parameters."""
    for name, parameter in parameters.items():
        gradient = parameter.grad
        assert gradient is not None
        if parameter.ndim > 1:
            gradient = gradient.add(parameter, alpha=weight_decay)
            weight_norm, gradient_norm = parameter.norm(), gradient.norm()
            ratio = torch.where((weight_norm > 0) & (gradient_norm > 0), eta * weight_norm / gradient_norm, 1.0)
            gradient = gradient.mul(ratio)
        momenta[name].mul_(momentum).add_(gradient)
        parameter.sub_(momenta[name], alpha=lr)


@torch.no_grad()
def ema(targets: Mapping[str, Tensor], parameters: Mapping[str, Tensor], tau: float) -> None:
    """The target's moving average in a loop over parameters."""
    for name, target in targets.items():
        target.mul_(tau).add_(parameters[name], alpha=1 - tau)


class EagerStep:
    """Parameters, target and momentum of a run, and its training step.

    Args:
        model: model whose weights are copied; its target must not have momentum batch norm.
        channels_last: channels-last images and weights, otherwise PyTorch's default layout.
        precision: "fp32", or "bf16" for autocast.
        stacked: both views in one forward pass, with batch norm on chunks. Off by default because separate passes are
            faster: 2.85 s per step instead of 3.26 s, and 4.16 s instead of 4.42 s in the default layout (96 px, 32
            images, MobileNetV3-Large w0.50,w0.625,w0.75,w1.00, one thread of a Xeon with AVX-512, medians of 4).
        compiled: torch.compile the forward pass of each subnet.
        weight_decay: weight decay of LARS.
        momentum: momentum of LARS.
        eta: trust coefficient of LARS.
    """

    def __init__(
        self,
        model: DSPNet,
        *,
        channels_last: bool = True,
        precision: str = "fp32",
        stacked: bool = False,
        compiled: bool = False,
        weight_decay: float = 1.5e-6,
        momentum: float = 0.9,
        eta: float = 1e-3,
    ) -> None:
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self.parameters = {name: self._copy(value).requires_grad_() for name, value in model.online.named_parameters()}
        self.targets = {name: self._copy(value) for name, value in model.target.named_parameters()}
        self.momenta = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        self._encoder, self._small_stem = ENCODERS[model.online.encoder.name], model.online.encoder.small_stem
        self._sizes = {subnet.name: model.online.layer_sizes(subnet)[1] for subnet in model.family}
        self._full = model.family.full
        self._precision = precision
        self._device = next(model.parameters()).device
        self._mean, self._std = (
            torch.tensor(values, device=self._device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        self._views_per_pass = 2 if stacked else 1
        self._hyperparameters = {"weight_decay": weight_decay, "momentum": momentum, "eta": eta}
        self._run = torch.compile(self._branch, dynamic=False) if compiled else self._branch

    def _copy(self, value: Tensor) -> Tensor:
        return value.detach().clone(memory_format=self._format if value.ndim == 4 else torch.contiguous_format)

    def _branch(self, layers: Layers, images: Tensor, predict: bool) -> Tensor:
        projection = mlp(layers, "projector", self._encoder(layers, images, self._small_stem))
        return mlp(layers, "predictor", projection) if predict else projection

    def _forward(self, weights: Mapping[str, Tensor], images: Tensor, subnet: Subnet, predict: bool) -> list[Tensor]:
        """Outputs for view 1 and view 2."""
        layers = Layers(weights, self._sizes[subnet.name], self._views_per_pass)
        with self._autocast():
            if self._views_per_pass == 2:
                return list(self._run(layers, images, predict).chunk(2))
            return [self._run(layers, view, predict) for view in images.chunk(2)]

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self._device.type, torch.bfloat16) if self._precision == "bf16" else nullcontext()

    def accumulate(self, images: Tensor, subnets: Sequence[Subnet]) -> dict[str, Tensor]:
        """Accumulate gradients of `subnets` for two views, [2B, 3, H, W]; returns the losses."""
        images = images.contiguous(memory_format=self._format)
        with torch.no_grad():
            first_target, second_target = self._forward(self.targets, images, self._full, predict=False)
        losses = {}
        for subnet in subnets:
            first, second = self._forward(self.parameters, images, subnet, predict=True)
            loss = regression(first, second_target) + regression(second, first_target)
            loss.backward()
            losses[subnet.name] = loss.detach()
        return losses

    def update(self, lr: float, tau: float) -> None:
        """Apply LARS and the target's moving average, and delete the gradients."""
        lars(self.parameters, self.momenta, lr, **self._hyperparameters)
        ema(self.targets, self.parameters, tau)
        for parameter in self.parameters.values():
            parameter.grad = None

    def step(self, batch: Tensor, subnets: Sequence[Subnet], lr: float, tau: float) -> dict[str, Tensor]:
        """Train one step on two views, uint8 [2B, 3, S, S]; returns the losses."""
        images = batch.float().div_(255).sub_(self._mean).div_(self._std)
        losses = self.accumulate(images, subnets)
        self.update(lr, tau)
        return losses
