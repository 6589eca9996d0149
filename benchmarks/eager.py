"""The baseline: DSPNet's training step in plain PyTorch, as fast as PyTorch's own kernels allow.

Like published slimmable networks, the functional networks use slices of the full weights, `weight[:o, :i]`, call
F.batch_norm for each view and have a backward pass per subnet. These measures make them faster:

* A subnet's slices are copied once per step, in the dtype of the convolution, for both views. Their gradients are added
  to prefixes of the full gradients; autograd through slices would create a full-size gradient for each view.
* Hardswish is in place only without gradients. With gradients, autograd would clone its input.
* Residuals and ReLU are in place. Squeeze-and-excite is matrix products, and the heads take both views at once.
* On CPUs, depthwise convolutions stay in fp32 under bf16: their backward pass in bf16 is several times slower.
* LARS and the target's update are multi-tensor functions (`torch._foreach_*`).

Nothing in a step synchronises with the device, so a CUDA graph can hold it. Definitions of subnets (`layer_sizes`) and
parameter names come from train/. The step is the same (tests/benchmarks/test_eager.py), except that running statistics
are not updated, which favours the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dspnet_fast.subnets import Subnet
from train.data.normalization import MEAN, STD
from train.pretraining.cuda_graphs import Capture, capture_graphs
from train.pretraining.dspnet import VIEWS, DSPNet

RELU_STAGES, STAGE_STRIDES = 3, (1, 2, 2, 2, 1, 2)  # MobileNetV3-Large uses hardswish from the fourth stage on
HEADS = ("projector", "predictor")


@dataclass(frozen=True)
class Layers:
    """The layers of a subnet, called by name.

    Args:
        weights: the subnet's prefixes of the full network's parameters.
        sizes: output channels or numbers of blocks of the subnet.
        views: number of views that the encoder gets at once.
    """

    weights: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    views: int = 1

    def _prefix(self, name: str, *sizes: int | None) -> Tensor:
        """The first `sizes` elements of each of a parameter's first dimensions."""
        return self.weights[name]

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """A dense convolution, padded to keep the size."""
        weight = self._prefix(f"{name}.weight", self.sizes[name], x.shape[1])
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)

    def depthwise(self, name: str, x: Tensor, stride: int) -> Tensor:
        """A depthwise convolution in the dtype of its weight."""
        weight = self._prefix(f"{name}.weight", x.shape[1])
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x.to(weight.dtype), weight, None, stride, weight.shape[-1] // 2, 1, x.shape[1])

    def norm(self, name: str, x: Tensor, views: int = 0) -> Tensor:
        """Batch normalisation in training mode, of each view separately. views: number of views in x [`views`]."""
        views = views or self.views
        weight, bias = (self._prefix(f"{name}.{kind}", x.shape[1]) for kind in ("weight", "bias"))
        if views == 1:  # the gradient of a chunk would be a copy
            return F.batch_norm(x, None, None, weight, bias, True)
        return torch.cat([F.batch_norm(view, None, None, weight, bias, True) for view in x.chunk(views)])

    def linear(self, name: str, x: Tensor) -> Tensor:
        """A linear layer, or a 1 x 1 convolution of maps of one pixel: [N, I] -> [N, O]."""
        weight = self._prefix(f"{name}.weight", self.sizes.get(name), x.shape[1])
        bias = self._prefix(f"{name}.bias", len(weight)) if f"{name}.bias" in self.weights else None
        return F.linear(x, weight.flatten(1), bias)

    def has(self, name: str) -> bool:
        """Whether the network has a layer of this name."""
        return f"{name}.weight" in self.weights


@dataclass(frozen=True)
class PrefixRecorder(Layers):
    """Layers that slice full parameters and record the shapes of the prefixes."""

    shapes: dict[str, torch.Size] = field(default_factory=dict)

    def _prefix(self, name: str, *sizes: int | None) -> Tensor:
        weight = prefix(self.weights[name], sizes)
        self.shapes[name] = weight.shape
        return weight


def prefix(tensor: Tensor, sizes: Sequence[int | None]) -> Tensor:
    """The first `sizes` elements of each of the first dimensions; None for all elements."""
    return tensor[tuple(map(slice, sizes))]


def hardswish(x: Tensor) -> Tensor:
    """Hardswish, in place without gradients."""
    return F.hardswish(x, inplace=not torch.is_grad_enabled())


def pool(x: Tensor) -> Tensor:
    """The mean over H and W. The gradient of a sum is a view; that of torch.mean is a copy in the default layout."""
    return x.sum((2, 3)) / x.shape[2:].numel()


def mobilenet_v3_large(layers: Layers, x: Tensor, small_stem: bool) -> Tensor:
    """[N, 3, H, W] -> [N, features]."""
    x = hardswish(layers.norm("encoder.bn1", layers.conv("encoder.conv_stem", x, 1 if small_stem else 2)))
    for stage, first_stride in enumerate(STAGE_STRIDES):
        act = F.relu_ if stage < RELU_STAGES else hardswish
        position = 0
        while layers.has(f"encoder.blocks.{stage}.{position}.conv_dw"):
            x = _mobile_block(layers, f"encoder.blocks.{stage}.{position}", x, 1 if position else first_stride, act)
            position += 1
    name = f"encoder.blocks.{len(STAGE_STRIDES)}.0"
    return pool(hardswish(layers.norm(f"{name}.bn1", layers.conv(f"{name}.conv", x))))


def _mobile_block(layers: Layers, name: str, x: Tensor, stride: int, act: Callable[[Tensor], Tensor]) -> Tensor:
    y, norms = x, iter((f"{name}.bn1", f"{name}.bn2", f"{name}.bn3"))
    project = f"{name}.conv_pw"
    if layers.has(f"{name}.conv_pwl"):
        y = act(layers.norm(next(norms), layers.conv(project, y)))
        project = f"{name}.conv_pwl"
    y = act(layers.norm(next(norms), layers.depthwise(f"{name}.conv_dw", y, stride)))
    if layers.has(f"{name}.se.conv_reduce"):
        gate = F.relu_(layers.linear(f"{name}.se.conv_reduce", pool(y)))
        y = y * F.hardsigmoid(layers.linear(f"{name}.se.conv_expand", gate))[:, :, None, None]
    y = layers.norm(next(norms), layers.conv(project, y))
    return y.add_(x) if stride == 1 and x.shape[1] == y.shape[1] else y


def resnet(layers: Layers, x: Tensor, small_stem: bool) -> Tensor:
    """[N, 3, H, W] -> [N, features]."""
    x = F.relu_(layers.norm("encoder.bn1", layers.conv("encoder.conv1", x, 1 if small_stem else 2)))
    if not small_stem:
        x = F.max_pool2d(x, 3, 2, 1)
    for stage in range(1, 5):
        for position in range(layers.sizes[f"encoder.layer{stage}"]):
            stride = 2 if stage > 1 and position == 0 else 1
            x = _basic_block(layers, f"encoder.layer{stage}.{position}", x, stride)
    return pool(x)


def _basic_block(layers: Layers, name: str, x: Tensor, stride: int) -> Tensor:
    y = F.relu_(layers.norm(f"{name}.bn1", layers.conv(f"{name}.conv1", x, stride)))
    y = layers.norm(f"{name}.bn2", layers.conv(f"{name}.conv2", y))
    if layers.has(f"{name}.downsample.0"):
        x = layers.norm(f"{name}.downsample.1", layers.conv(f"{name}.downsample.0", x, stride))
    return F.relu_(y.add_(x))


ENCODERS = {"mobilenet_v3_large": mobilenet_v3_large, "resnet": resnet}


def heads(layers: Layers, x: Tensor, names: Sequence[str], views: int) -> Tensor:
    """Linear - BN - ReLU - Linear for each name, for the features [N, F] of `views` views."""
    for name in names:
        hidden = F.relu_(layers.norm(f"{name}.bn1", layers.linear(f"{name}.fc1", x), views))
        x = layers.linear(f"{name}.fc2", hidden)
    return x


def regression(p: Tensor, z: Tensor) -> Tensor:
    """Mean of 2 - 2 cos(p, z), at least in fp32."""
    p, z = (v if v.dtype == torch.float64 else v.float() for v in (p, z))
    return (2 - 2 * (F.normalize(p) * F.normalize(z)).sum(1)).mean()


def _add(tensors: Sequence[Tensor], others: Sequence[Tensor], factor: float | Tensor) -> None:
    if isinstance(factor, Tensor):
        torch._foreach_add_(tensors, torch._foreach_mul(others, factor))
    else:
        torch._foreach_add_(tensors, others, alpha=factor)


@torch.no_grad()
def lars(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    lr: float | Tensor,
    *,
    weight_decay: float,
    momentum: float,
    eta: float,
) -> None:
    """LARS; changes the gradients. lr: learning rate, a scalar on the device in CUDA graphs."""
    adapted = [index for index, parameter in enumerate(parameters) if parameter.ndim > 1]
    weights, updates = ([tensors[index] for index in adapted] for tensors in (parameters, gradients))
    torch._foreach_add_(updates, weights, alpha=weight_decay)
    weight_norms, update_norms = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, updates))
    ratios = torch.where((weight_norms > 0) & (update_norms > 0), eta * weight_norms / update_norms, 1.0)
    torch._foreach_mul_(updates, ratios.unbind())
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_add_(momenta, gradients)
    _add(parameters, momenta, -lr)


@torch.no_grad()
def ema(targets: Sequence[Tensor], parameters: Sequence[Tensor], tau: float | Tensor) -> None:
    """The target's moving average. tau: its decay, a scalar on the device in CUDA graphs."""
    if isinstance(tau, Tensor):
        torch._foreach_mul_(targets, tau)
        _add(targets, parameters, 1 - tau)
    else:
        torch._foreach_lerp_(targets, parameters, 1 - tau)


class EagerStep:
    """Parameters, target and momentum of a run, and its training step.

    Args:
        model: model whose weights are copied; its target must not have momentum batch norm.
        channels_last: channels-last images and weights, otherwise PyTorch's default layout.
        precision: "fp32", or "bf16" for autocast.
        views: "separate": the encoder gets one view after another, the heads both at once. "stacked": the encoder also
            gets both at once; convolutions are larger, but batch norm copies its outputs for the two views into one
            tensor, and their gradients likewise. "sequential": the backward pass of one view precedes the forward pass
            of the next, which needs least memory.
        compiled: torch.compile encoder and heads of each subnet.
        weight_decay: weight decay of LARS.
        momentum: momentum of LARS.
        eta: trust coefficient of LARS.

    Attributes:
        parameters, gradients, momenta, targets: tensors by parameter name.
    """

    def __init__(
        self,
        model: DSPNet,
        *,
        channels_last: bool = True,
        precision: str = "fp32",
        views: str = "separate",
        compiled: bool = False,
        weight_decay: float = 1.5e-6,
        momentum: float = 0.9,
        eta: float = 1e-3,
    ) -> None:
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self.parameters = {name: self._copy(value) for name, value in model.online.named_parameters()}
        self.targets = {name: self._copy(value) for name, value in model.target.named_parameters()}
        self.gradients, self.momenta = (
            {name: torch.zeros_like(value) for name, value in self.parameters.items()} for _ in range(2)
        )
        self._network, self._small_stem = ENCODERS[model.online.encoder.name], model.online.encoder.small_stem
        self._sizes = {subnet.name: model.online.layer_sizes(subnet)[1] for subnet in model.family}
        self._full = model.family.full
        self._bf16, self._views = precision == "bf16", views
        example = next(model.parameters())
        self._device, self._dtype = example.device, example.dtype
        self._shapes = {subnet.name: self._prefix_shapes(subnet) for subnet in model.family}
        self._mean, self._std = (torch.tensor(values, device=self._device).view(3, 1, 1) for values in (MEAN, STD))
        self._hyperparameters = {"weight_decay": weight_decay, "momentum": momentum, "eta": eta}
        self._encoder, self._heads = self._encode, heads
        if compiled:
            self._encoder, self._heads = (torch.compile(part, dynamic=False) for part in (self._encode, heads))

    def _memory_format(self, value: Tensor) -> torch.memory_format:
        return self._format if value.ndim == 4 else torch.contiguous_format

    def _copy(self, value: Tensor) -> Tensor:
        return value.detach().clone(memory_format=self._memory_format(value))

    def _encode(self, layers: Layers, images: Tensor) -> Tensor:
        return self._network(layers, images, self._small_stem)

    @torch.no_grad()
    def _prefix_shapes(self, subnet: Subnet) -> dict[str, torch.Size]:
        """Shapes of the subnet's weights by name, found by running it on a few images."""
        recorder = PrefixRecorder(self.parameters, self._sizes[subnet.name], VIEWS)
        images = torch.zeros(2 * VIEWS, 3, 64, 64, dtype=self._dtype, device=self._device)
        heads(recorder, self._encode(recorder, images), HEADS, VIEWS)
        return recorder.shapes

    def _layers(self, full: Mapping[str, Tensor], subnet: Subnet) -> Layers:
        """The subnet's layers, whose weights are copied unless they are whole."""
        weights = {}
        for name, shape in self._shapes[subnet.name].items():
            if name in full:
                weight = prefix(full[name], shape)
                if self._bf16 and weight.ndim > 1 and not (weight.shape[1] == 1 and self._device.type == "cpu"):
                    weight = weight.bfloat16()
                weights[name] = weight.contiguous(memory_format=self._memory_format(weight)).detach()
        return Layers(weights, self._sizes[subnet.name], VIEWS if self._views == "stacked" else 1)

    def _forward(self, layers: Layers, images: Tensor, names: Sequence[str], views: int) -> Tensor:
        """Outputs [N, D] of the heads for the images of `views` views."""
        with self._autocast():
            parts = [images] if self._views == "stacked" else images.chunk(views)
            features = [self._encoder(layers, part) for part in parts]
            return self._heads(layers, features[0] if len(parts) == 1 else torch.cat(features), names, views)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self._device.type, torch.bfloat16) if self._bf16 else nullcontext()

    def accumulate(self, images: Tensor, subnets: Sequence[Subnet]) -> dict[str, Tensor]:
        """Add the gradients of `subnets` for two views, [2B, 3, H, W]; returns the losses."""
        images = images.contiguous(memory_format=self._format)
        with torch.no_grad():
            targets = self._forward(self._layers(self.targets, self._full), images, HEADS[:1], VIEWS)
            targets = targets.roll(len(targets) // VIEWS, 0)  # each view predicts the other
        parts = images.chunk(VIEWS) if self._views == "sequential" else [images]
        views = VIEWS // len(parts)
        losses = {}
        for subnet in subnets:
            layers = self._layers(self.parameters, subnet)
            for weight in layers.weights.values():
                weight.requires_grad_()
            losses[subnet.name] = torch.zeros((), dtype=self._dtype, device=self._device)
            for part, part_targets in zip(parts, targets.chunk(len(parts)), strict=True):
                loss = views * regression(self._forward(layers, part, HEADS, views), part_targets)
                loss.backward()
                losses[subnet.name] += loss.detach()
            torch._foreach_add_(
                [prefix(self.gradients[name], weight.shape) for name, weight in layers.weights.items()],
                [weight.grad for weight in layers.weights.values()],
            )
        return losses

    def update(self, lr: float | Tensor, tau: float | Tensor) -> None:
        """Apply LARS and the target's moving average, and set the gradients to zero."""
        parameters, gradients = list(self.parameters.values()), list(self.gradients.values())
        lars(parameters, gradients, list(self.momenta.values()), lr, **self._hyperparameters)
        ema(list(self.targets.values()), [self.parameters[name] for name in self.targets], tau)
        torch._foreach_zero_(gradients)

    def step(
        self, batch: Tensor, subnets: Sequence[Subnet], lr: float | Tensor, tau: float | Tensor
    ) -> dict[str, Tensor]:
        """Train one step on two views, uint8 [2B, 3, S, S]; returns the losses.

        lr and tau may be scalars on the device.
        """
        images = batch.contiguous(memory_format=self._format).float().div_(255).sub_(self._mean).div_(self._std)
        losses = self.accumulate(images, subnets)
        self.update(lr, tau)
        return losses

    def graphed(
        self, batch: Tensor, subnets: Sequence[Subnet], capture: Capture = capture_graphs
    ) -> Callable[[float, float], dict[str, Tensor]]:
        """Capture a step as a CUDA graph.

        Args:
            batch: the static batch; every replay reads its contents.
            subnets: the subnets that every replay trains.
            capture: how to capture.

        Returns:
            A function of lr and tau that replays the step. It returns the losses in static tensors.
        """
        lr, tau = (torch.zeros((), dtype=self._dtype, device=self._device) for _ in range(2))
        losses: dict[str, Tensor] = {}
        state = [*self.parameters.values(), *self.momenta.values(), *self.targets.values()]
        before = [tensor.clone() for tensor in state]
        (run,) = capture([lambda: losses.update(self.step(batch, subnets, lr, tau))])
        torch._foreach_copy_(state, before)

        def replay(new_lr: float, new_tau: float) -> dict[str, Tensor]:
            lr.fill_(new_lr)
            tau.fill_(new_tau)
            run()
            return losses

        return replay
