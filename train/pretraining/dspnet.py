"""The algorithm: BYOL whose online network is, in turn, every sampled subnet of a family (DSPNet section 4).

One training step of a batch of B images, two views each, stacked as [2B, 3, H, W]:

    z' = target(view 1; view 2)                                  once, full network, no gradient
    for every sampled subnet s, the full network last:
        p   = predictor(projector(encoder_s(view 1; view 2)))
        L_s = mean_b [(2 - 2 cos(p_1, z'_2)) + (2 - 2 cos(p_2, z'_1))]
        backward at once: gradients add up, activations are freed
    optimizer step, then  target <- tau target + (1 - tau) online      (train/pretraining/flat_buffers.py)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dspnet_fast.models import MLP, Network, build
from dspnet_fast.nn import MomentumBatchNorm1d, MomentumBatchNorm2d, activate
from dspnet_fast.nn.activate import Sizes
from dspnet_fast.nn.batch_norm import MomentumBatchNorm, SlimBatchNorm, SlimBatchNorm2d
from dspnet_fast.nn.deferred import Activation, Deferred
from dspnet_fast.ops import normalized_mse
from dspnet_fast.subnets import Family, Subnet

VIEWS = 2


class Branch(nn.Module):
    """Encoder and projector, and for the online network the predictor: images [N, 3, H, W] to [N, D]."""

    def __init__(self, encoder: Network, projector: MLP, predictor: MLP | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.predictor = predictor

    def layer_sizes(self, dn: Subnet | str) -> tuple[str, Sizes]:
        """A subnet of the branch is a subnet of its encoder; the heads are shared and full."""
        name, sizes = self.encoder.layer_sizes(dn)
        return name, {f"encoder.{path}": size for path, size in sizes.items()}

    def forward(self, images: Tensor) -> Tensor:
        """Predict (online) or project (target)."""
        features = self.encoder(images)
        projection = self.projector(features.to(self.projector.fc1.weight.dtype))
        return projection if self.predictor is None else self.predictor(projection)


class DSPNet(nn.Module):
    """Online and target networks of a family, and the losses between them.

    Args:
        network: a key of `dspnet_fast.models.NETWORKS`.
        family: the subnets to pretrain; a family of one is BYOL.
        stem: the encoder's stem, "standard" or "small".
        hidden_features, out_features: sizes of projector and predictor.
        momentum_bn: momentum batch normalisation in the target: "off", "on", or "momentum2" for the variance as the
            published code of Momentum^2 Teacher computes it.
        groups: parts of the batch that batch normalisation treats by themselves, as many ranks do.
        precision: "fp32", or "bf16" to store the encoder's activations in bf16; weights, sums, statistics and heads
            stay fp32.
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
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.family = family
        self.groups = groups
        self.precision = precision
        encoder = build(network, family.full, stem)
        projector = MLP(encoder.num_features, hidden_features, out_features)
        self.online = Branch(encoder, projector, MLP(out_features, hidden_features, out_features))
        self.target = Branch(copy.deepcopy(encoder), copy.deepcopy(projector), None).requires_grad_(False)
        if momentum_bn != "off":
            _use_momentum_batch_norm(self.target, double_correction=momentum_bn == "momentum2")

    def _stored(self, images: Tensor) -> Tensor:
        """The images in the dtype that activations are stored in."""
        return images.bfloat16() if self.precision == "bf16" else images

    @torch.no_grad()
    def targets(self, images: Tensor, alpha: float | Tensor = 1.0) -> Tensor:
        """Projections [2B, D] by the full target network, the two views exchanged: row i is what row i of the online
        network predicts. `alpha` is the batch's share in momentum batch normalisation, a number or a scalar tensor."""
        for module in self.target.modules():
            if isinstance(module, MomentumBatchNorm):
                module.alpha = alpha
        with activate(self.target, None, views=VIEWS * self.groups):
            first, second = self.target(self._stored(images)).chunk(VIEWS)
        return torch.cat([second, first])

    def loss(
        self, images: Tensor, targets: Tensor, subnet: Subnet, complete: Callable[[str], None] | None = None
    ) -> Tensor:
        """Symmetrised loss of one subnet, a scalar from 0 to 8.

        `complete` is called in its backward pass with the name of a part of the online network, the projector and then
        the encoder's stages from the last to the first: the gradients of it and of all that follow it are complete.
        """
        with activate(self.online, subnet, views=VIEWS * self.groups), self._telling(complete):
            predictions = self.online(self._stored(images))
        return VIEWS * normalized_mse(predictions, targets)

    @contextmanager
    def _telling(self, complete: Callable[[str], None] | None) -> Iterator[None]:
        """A part is complete when the gradient of what went into it is there."""
        parts = [] if complete is None else [*(f"encoder.{stage}" for stage in self.online.encoder.stages), "projector"]

        def watched(part: str) -> RemovableHandle:
            def before(module: nn.Module, inputs: tuple[Activation]) -> None:
                x = inputs[0].x if isinstance(inputs[0], Deferred) else inputs[0]
                x.register_hook(lambda gradient: complete(part))  # type: ignore[misc]

            return self.online.get_submodule(part).register_forward_pre_hook(before)

        handles = [watched(part) for part in parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def accumulate(
        self,
        images: Tensor,
        subnets: Sequence[Subnet],
        alpha: float | Tensor = 1.0,
        complete: Callable[[str], None] | None = None,
    ) -> dict[str, Tensor]:
        """Add the gradients of the summed losses of all `subnets`, one backward at a time.

        Args:
            images: the two views, [2B, 3, H, W]: view 1 of every image, then view 2.
            subnets: what `sandwich` sampled, the full network last.
            alpha: see `targets`.
            complete: see `loss`; called in the last of these backwards.

        Returns:
            The loss of each subnet, detached scalars on the device.
        """
        targets = self.targets(images, alpha)
        losses = {}
        for subnet in subnets:
            loss = self.loss(images, targets, subnet, complete if subnet is subnets[-1] else None)
            loss.backward()
            losses[subnet.name] = loss.detach()
        return losses


def _use_momentum_batch_norm(module: nn.Module, double_correction: bool) -> None:
    """Replace every batch normalisation by its momentum variant; parameters, buffers and names stay."""
    for name, child in module.named_children():
        if not isinstance(child, SlimBatchNorm):
            _use_momentum_batch_norm(child, double_correction)
            continue
        kind = MomentumBatchNorm2d if isinstance(child, SlimBatchNorm2d) else MomentumBatchNorm1d
        momentum_norm = kind(child.num_features, child.eps)
        momentum_norm.load_state_dict(child.state_dict())
        momentum_norm.double_correction = double_correction
        module.add_module(name, momentum_norm.requires_grad_(False))
