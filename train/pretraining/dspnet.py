"""The algorithm: BYOL whose online network is, in turn, every sampled subnet of a family (DSPNet, section 4).

One training step on a batch of B images, two views each, stacked as [2B, C, H, W]:

    z' = target(view 1; view 2)                                  once, full network, no gradient
    for every sampled subnet s, the full network last:
        p   = predictor(projector(encoder_s(view 1; view 2)))
        L_s = mean_b [(2 - 2 cos(p_1, z'_2)) + (2 - 2 cos(p_2, z'_1))]
        backward at once: gradients add up, activations are freed
    LARS step, then  target <- tau target + (1 - tau) online     (flat_buffers.py)

With a frozen teacher (docs/teacher.md) the loss has another term and a weight w, and with w = 0 no z' is computed:

    q   = teacher head(encoder_s(view 1; view 2))
    L_s = mean_b [(2 - 2 cos(q_1, t_1)) + (2 - 2 cos(q_2, t_2))] + w (the loss above)    t_v: teacher's target of view v

and --local-weight adds the same distance between feature maps, as a mean over images and positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dspnet_fast.models import MLP, Network, TeacherHead, build, family
from dspnet_fast.nn import activate, configure_batch_norm
from dspnet_fast.nn.activate import Sizes
from dspnet_fast.nn.batch_norm import SlimBatchNorm
from dspnet_fast.nn.prefix import shared_prefixes
from dspnet_fast.nn.selected import momentum_class
from dspnet_fast.ops import normalized_mse
from dspnet_fast.ops.registry import is_eager
from dspnet_fast.subnets import Family, Subnet

from ..config import PretrainConfig

VIEWS = 2
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # dtypes of the precisions in 16 bits


class Taught(NamedTuple):
    """A teacher's features of a batch of views, or the targets made of them.

    Attributes:
        features: [2B, T].
        positions: [2B, P, C], its feature map at the P positions of the subnets' maps, row by row; None without
            --local-weight.
    """

    features: Tensor
    positions: Tensor | None = None

    def each(self, function: Callable[[Tensor], Tensor]) -> Taught:
        """The results of a function of each tensor."""
        return Taught(*(None if tensor is None else function(tensor) for tensor in self))  # type: ignore[arg-type]


class Branch(nn.Module):
    """Encoder and heads.

    Args:
        encoder: images [N, 3, H, W] to features [N, F].
        projector: features to projections [N, D]; None if no projection is regressed.
        predictor: projections to predictions [N, D], in the online branch.
        teacher_head: features to predictions [N, T] of a teacher's features, in the online branch.
        local_head: the same for each position of feature maps, a 1 x 1 convolution: rows [N P, F] to [N P, C].
    """

    def __init__(
        self,
        encoder: Network,
        projector: MLP | None,
        predictor: MLP | None = None,
        teacher_head: TeacherHead | None = None,
        local_head: TeacherHead | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.predictor = predictor
        self.teacher_head = teacher_head
        self.local_head = local_head

    def layer_sizes(self, dn: Subnet | str) -> tuple[str, Sizes]:
        """The encoder's sizes for a subnet; the heads are shared and always full."""
        name, sizes = self.encoder.layer_sizes(dn)
        return name, {f"encoder.{path}": size for path, size in sizes.items()}

    def forward(self, images: Tensor) -> Tensor:
        """Prediction (online) or projection (target) of each image."""
        return self.heads(*self.encode(images))

    def encode(self, images: Tensor, dense: bool = False) -> list[Tensor]:
        """Features [N, F] of images and, if `dense`, their feature maps [N, F, h, w], in the dtype that heads take."""
        outputs = self.encoder.forward_dense(images) if dense else [self.encoder(images)]
        return list(outputs) if is_eager() else [output.to(next(self.parameters()).dtype) for output in outputs]

    @cached_property
    def modules_by_name(self) -> dict[str, nn.Module]:
        """All modules of the branch, in which `activate` finds the layers of a subnet."""
        return dict(self.named_modules())

    @cached_property
    def encoder_norms(self) -> list[SlimBatchNorm]:
        """The encoder's batch normalisation layers."""
        return [module for module in self.encoder.modules() if isinstance(module, SlimBatchNorm)]

    def heads(self, features: Tensor) -> Tensor:
        """Prediction or projection of features [N, F]."""
        assert self.projector is not None
        projection = self.projector(features)
        return projection if self.predictor is None else self.predictor(projection)


class DSPNet(nn.Module):
    """Online and target networks of a family, and the losses between them.

    Attributes:
        loss_scale: factor of the loss in backward passes, a scalar on the device; None for 1.
        overlaps_all_reduce: whether gradients are all-reduced during the full network's backward pass.

    Args:
        network: a key of `dspnet_fast.models.NETWORKS`.
        family: the subnets to pretrain; a family of one is BYOL.
        stem: the encoder's stem, "standard" or "small".
        hidden_features, out_features: sizes of projector and predictor.
        momentum_bn: momentum batch normalisation in the target: "off", "on", or "momentum2" for the variance as the
            published code of Momentum^2 Teacher computes it.
        precision: "fp32", or "bf16" or "fp16" for activations and, with plain PyTorch, for all convolutions and matrix
            products, as in automatic mixed precision. Weights, sums and statistics stay in fp32, and with the
            operators of `dspnet_fast.ops` the heads too.
        bn_groups: ghost-batch-norm groups per view.
        process_group: ranks that share a group and synchronise its statistics; None for this rank alone.
        in_channels: channels of the images.
        teacher_features: features T of a frozen teacher; None without a teacher.
        self_weight: with a teacher, weight of BYOL's loss; 0 leaves out projector, predictor and target's forward pass.
        local_weight: with a teacher, weight of the loss between feature maps.
        teacher_map_channels: channels C of the teacher's feature map; None with a local_weight of 0.
    """

    def __init__(
        self,
        network: str,
        family: Family,
        stem: str = "standard",
        hidden_features: int = 4096,
        out_features: int = 256,
        momentum_bn: str = "on",
        precision: str = "fp32",
        bn_groups: int = 1,
        process_group: dist.ProcessGroup | None = None,
        in_channels: int = 3,
        teacher_features: int | None = None,
        self_weight: float = 1.0,
        local_weight: float = 0.0,
        teacher_map_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.family = family
        self.self_weight = 1.0 if teacher_features is None else self_weight
        self.local_weight = local_weight
        self.precision = precision
        self.loss_scale: Tensor | None = None
        self.overlaps_all_reduce = False
        encoder = build(network, family.full, stem, in_channels)
        projector = predictor = teacher_head = local_head = None
        if self.self_weight:
            projector = MLP(encoder.num_features, hidden_features, out_features)
            predictor = MLP(out_features, hidden_features, out_features)
        if teacher_features is not None:
            teacher_head = TeacherHead(encoder.num_features, teacher_features)
        if local_weight:
            assert teacher_map_channels is not None
            local_head = TeacherHead(encoder.dense_features, teacher_map_channels)
        self.online = Branch(encoder, projector, predictor, teacher_head, local_head)
        self.target = Branch(copy.deepcopy(encoder), copy.deepcopy(projector)).requires_grad_(False)
        if momentum_bn != "off":
            _use_momentum_batch_norm(self.target, double_correction=momentum_bn == "momentum2")
        configure_batch_norm(self, bn_groups=bn_groups, process_group=process_group)

    def batch_norms(self) -> list[SlimBatchNorm]:
        """All batch normalisation layers, online and target."""
        return [module for module in self.modules() if isinstance(module, SlimBatchNorm)]

    @torch.no_grad()
    def targets(self, images: Tensor, alpha: float | Tensor = 1.0) -> Tensor:
        """Projections by the full target network, with the two views swapped.

        Args:
            images: the two views, [2B, C, H, W]: view 1 of every image, then view 2.
            alpha: weight of the batch in momentum batch normalisation, a number or a scalar tensor.

        Returns:
            [2B, D]; row i is the regression target of the online prediction in row i. [0, 0] if `self_weight` is 0.
        """
        if not self.self_weight:
            return images.new_zeros(0, 0)
        modules = self.target.modules_by_name
        configure_batch_norm(modules.values(), alpha=alpha)
        with activate(self.target, None, views=VIEWS, modules=modules):
            first, second = self.target.heads(*self._encode(self.target, images)).chunk(VIEWS)
        return torch.cat([second, first])

    def loss(self, images: Tensor, targets: Tensor, subnet: Subnet, taught: Taught | None = None) -> Tensor:
        """Symmetrised loss of one subnet, a scalar between 0 and 8.

        With a teacher, between 0 and 8 (1 + self_weight + local_weight).

        Args:
            images, targets: see `targets`.
            subnet: the subnet.
            taught: the teacher's targets, in the order of `images`; None without a teacher.
        """
        online = self.online
        losses = []
        with activate(online, subnet, views=VIEWS, modules=online.modules_by_name):
            features, *maps = self._encode(online, images, dense=online.local_head is not None)
            if online.teacher_head is not None:
                assert taught is not None
                losses.append(VIEWS * normalized_mse(online.teacher_head(features), taught.features))
            if online.local_head is not None:
                assert taught is not None and taught.positions is not None
                predicted = online.local_head(maps[0].permute(0, 2, 3, 1).flatten(0, 2))
                local = VIEWS * normalized_mse(predicted, taught.positions.flatten(0, 1))
                losses.append(self.local_weight * local)
            if online.projector is not None:
                loss = VIEWS * normalized_mse(online.heads(features), targets)
                losses.append(self.self_weight * loss if losses else loss)
        return sum(losses[1:], losses[0])

    def accumulate_subnet(
        self, images: Tensor, targets: Tensor, subnet: Subnet, taught: Taught | None = None
    ) -> Tensor:
        """Add the gradient of one subnet's loss, times `loss_scale`; returns the loss, detached."""
        with shared_prefixes(collects=True, whole=not self.overlaps_all_reduce):
            loss = self.loss(images, targets, subnet, taught)
            (loss if self.loss_scale is None else loss * self.loss_scale).backward()
        return loss.detach()

    def accumulate(
        self,
        images: Tensor,
        subnets: Sequence[Subnet],
        alpha: float | Tensor = 1.0,
        taught: Taught | None = None,
    ) -> dict[str, Tensor]:
        """Add the gradients of the summed losses of all `subnets`, one backward pass at a time.

        Args:
            images: see `targets`.
            subnets: the subnets that `sandwich` sampled, the full network last.
            alpha: see `targets`.
            taught: see `loss`.

        Returns:
            The loss of each subnet by name, detached scalars on the device.
        """
        targets = self.targets(images, alpha)
        return {subnet.name: self.accumulate_subnet(images, targets, subnet, taught) for subnet in subnets}

    @property
    def encoder_passes(self) -> int:
        """Passes of the encoder for a subnet.

        Plain PyTorch encodes one view after another, because batch normalisation of both would copy its outputs into
        one tensor. On a CPU dense convolutions, and all in 16 bits, gain more from a single pass, which reorders and
        converts each weight once.
        """
        encoder = self.online.encoder
        on_cpu = next(encoder.parameters()).device.type == "cpu"
        single = on_cpu and (encoder.dense or self.precision in HALF)
        return VIEWS if is_eager() and not single else 1

    def _encode(self, branch: Branch, images: Tensor, dense: bool = False) -> list[Tensor]:
        """Features [2B, F] of a branch and, if `dense`, feature maps [2B, F, h, w]."""
        dtype = HALF.get(self.precision, images.dtype)
        if branch.encoder.uses_autocast and dtype != images.dtype:
            with torch.autocast(images.device.type, dtype):
                return [output.to(images.dtype) for output in self._encode_views(branch, images, dense)]
        return self._encode_views(branch, images.to(dtype), dense)

    def _encode_views(self, branch: Branch, images: Tensor, dense: bool) -> list[Tensor]:
        if self.encoder_passes == 1:
            return branch.encode(images, dense)
        outputs = []
        with shared_prefixes():
            for view, part in enumerate(images.chunk(VIEWS)):
                with configure_batch_norm(branch.encoder_norms, view=view):
                    outputs.append(branch.encode(part, dense))
        return [torch.cat(views) for views in zip(*outputs, strict=True)]


def build_model(config: PretrainConfig, bn_groups: int = 1, process_group: dist.ProcessGroup | None = None) -> DSPNet:
    """The networks of a run before its first step; the weights depend on the configuration alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return DSPNet(
            config.network,
            family(config.network, config.names()),
            config.stem,
            config.hidden_features,
            config.out_features,
            config.momentum_bn,
            config.precision,
            bn_groups,
            process_group,
            config.in_channels,
            config.teacher_features,
            config.self_weight,
            config.local_weight,
            config.teacher_map_channels,
        )


def _use_momentum_batch_norm(module: nn.Module, double_correction: bool) -> None:
    """Make every batch normalisation its momentum variant, in place."""
    for norm in module.modules():
        if isinstance(norm, SlimBatchNorm):
            norm.__class__ = momentum_class(norm)
            norm.double_correction = double_correction  # type: ignore[assignment]
