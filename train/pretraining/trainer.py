"""The training step and the state it changes, without files, terminal output or data loading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dspnet_fast.errors import InputError
from dspnet_fast.models.published import Source, load_published
from dspnet_fast.subnets import Subnet, sandwich
from dspnet_fast.weight_file import load_state

from ..config import EIGHT_BIT, PretrainConfig
from ..costs.flops import largest_activation
from ..data.normalization import prepare
from ..distributed.all_reduce import GradientAllReduce
from ..distributed.batch_split import Accumulate, split_batch
from ..distributed.process_group import SINGLE_PROCESS, World
from ..run.device import check_activations, check_precision, configure_cuda
from ..run.schedules import learning_rate, momentum_alpha, target_tau, weight_decay
from ..teachers.targets import TeacherTargets
from . import cuda_graphs
from .dspnet import VIEWS, DSPNet, Taught, build_model
from .flat_buffers import FlatBuffers
from .loss_scale import SEARCH, LossScale
from .nonfinite import MAX_IN_A_ROW, Finding, Guard, find_nonfinite

INITIAL_REMEDY = "give --init-from a run with the same --network, --dns, --stem, --hidden-features and --out-features"


class Trainer:
    """Networks, optimizer state and step count of a run.

    Everything else that a step depends on (learning rate, tau, alpha, sampled subnets) is a function of the step count,
    so `state` and `load_state` are sufficient for a bit-exact resume.

    Args:
        config: the run's configuration.
        epoch_steps: steps per epoch.
        device: device to train on.
        world: the process group; every rank computes its share of each batch.

    Attributes:
        model: the networks, a `DSPNet`.
        flat_buffers: their parameters, gradients, momentum and statistics.
        teacher: targets of the teacher; to be set before the first step of a run with one.
        guard: skips and counts non-finite steps.
        loss_scale: factor of the loss with fp16; None with other precisions.
        max_skipped: consecutive non-finite steps after which a run ends.
        step, steps: steps done, and steps of the run.
    """

    def __init__(
        self, config: PretrainConfig, epoch_steps: int, device: torch.device, world: World = SINGLE_PROCESS
    ) -> None:
        check_precision(config.precision, device)
        if device.type == "cuda":
            configure_cuda(config.tf32, config.cudnn)
        self.config = config
        self.device = device
        self.world = world
        self.teacher: TeacherTargets | None = None
        self.step = 0
        self.steps = config.epochs * epoch_steps
        self.epoch_steps = epoch_steps
        self.warmup_steps = round(config.warmup_epochs * epoch_steps)
        self.full_only_steps = config.full_only_steps(epoch_steps)

        self._split = split = split_batch(config, world.size)
        model = build_model(config, split.bn_groups, world.subgroup(split.ranks_per_group))
        self.model = model.to(device).to(memory_format=torch.channels_last).train()
        if device.type == "cuda":
            images = VIEWS // self.model.encoder_passes * config.batch_size // world.size
            check_activations(largest_activation(config), images, split.micro_batches)
        self.flat_buffers = FlatBuffers(self.model.online, self.model.target, config.optimizer)
        self.guard = Guard(self.flat_buffers)
        self.loss_scale = LossScale(device) if config.precision == "fp16" else None
        self.model.loss_scale = self.loss_scale.scale if self.loss_scale else None
        self.max_skipped = MAX_IN_A_ROW + (SEARCH if self.loss_scale else 0)
        self.all_reduce = GradientAllReduce(self.flat_buffers, world)
        self._alpha = torch.zeros((), device=device)
        self._weight_decay = config.weight_decay

        overlaps = config.overlap_all_reduce and world.size > 1
        graphs = device.type == "cuda" and not config.no_cuda_graphs
        if graphs and (overlaps or split.ranks_per_group > 1):
            raise InputError(
                "CUDA graphs cannot hold collectives: --overlap-all-reduce, and --bn-groups below the number of "
                "ranks, need --no-cuda-graphs"
            )
        if overlaps:
            self.model.overlaps_all_reduce = True
            stages = [f"encoder.{stage}" for stage in self.model.online.encoder.stages]
            # The head of feature maps is the last in the buffers, and its gradient may come after those of other heads.
            heads = [] if config.local_weight else ["projector" if self.model.self_weight else "teacher_head"]
            self.all_reduce.overlap(self.model.online, [*stages, *heads])
        accumulate = _accumulate_on(self.model, self._alpha, device)
        if graphs:
            accumulate = cuda_graphs.captured(self.model, self.flat_buffers, self._alpha)
        self.accumulate = split.over_micro_batches(accumulate, self.flat_buffers.statistics)

    def train_step(self, batch: Tensor) -> dict[str, Tensor]:
        """One step.

        Args:
            batch: this rank's share of the batch, two views of B images: 8-bit uint8 [2B, 1 or 3, S, S], or
                normalised float32 [2B, C, S, S], on any device.

        Returns:
            The losses of the sampled subnets on this rank, scalars on the device.
        """
        subnets = self._sample(self.step)
        self._alpha.fill_(momentum_alpha(self.step, self.steps))
        self.schedule(self.step)
        self.guard.begin()
        self.all_reduce.begin(self._split.micro_batches * len(subnets), self.model.encoder_passes)
        losses = self.accumulate(batch, subnets, None if self.teacher is None else self.teacher(self.step, batch))
        self.all_reduce.finish()
        if (shares := self.world.size * self._split.micro_batches) > 1:
            self.flat_buffers.grads /= shares
        if self.loss_scale is not None:
            self.flat_buffers.grads /= self.loss_scale.scale
        self.world.all_reduce_mean(self.flat_buffers.statistics)
        self.update()
        self.step += 1
        return losses

    def _sample(self, step: int) -> list[Subnet]:
        """The subnets of a step."""
        if step < self.full_only_steps:
            return [self.model.family.full]
        return sandwich(self.model.family, self.config.subnets_per_step, self.config.seed, step)

    def schedule(self, step: int) -> None:
        """Set the scheduled values of a step for `update`."""
        self._weight_decay = self.weight_decay(step)
        self.flat_buffers.schedule(self.learning_rate(step), self.tau(step), self._weight_decay)

    def update(self) -> None:
        """Optimizer step and target update with the accumulated gradient, skipped if a number is not finite."""
        config, flat = self.config, self.flat_buffers
        self.guard.check()
        if config.optimizer == "adamw":
            flat.update_adamw(beta1=config.momentum, beta2=config.beta2, apply=self.guard.finite)
        else:
            flat.update(
                weight_decay=self._weight_decay, momentum=config.momentum, eta=config.eta, apply=self.guard.finite
            )
        self.guard.finish()
        if self.loss_scale is not None:
            self.loss_scale.update(self.guard.finite)

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step."""
        peak = self.config.base_lr * self.config.batch_size / 256
        return learning_rate(step, self.steps, self.warmup_steps, peak)

    def weight_decay(self, step: int) -> float:
        """Weight decay of a step."""
        start, end = self.config.weight_decay, self.config.weight_decay_end
        return weight_decay(step, self.steps, start, start if end is None else end)

    def tau(self, step: int) -> float:
        """Decay of the target in a step."""
        return target_tau(step, self.steps, self.config.tau)

    def diagnose(self, batch: Tensor) -> Finding | None:
        """The first non-finite number in a step on this batch, with the subnets of the last step."""
        subnets = self._sample(self.step - 1)
        taught = None if self.teacher is None else self.teacher(self.step - 1, batch)
        for micro_batch, part in zip(self._split.split(batch), self._split.split_taught(taught), strict=True):
            images = prepare(micro_batch, self.device)
            finding = find_nonfinite(self.model, self.flat_buffers, images, subnets, self._alpha, part)
            if finding is not None:
                return finding
        return None

    def state(self) -> dict[str, Any]:
        """The contents of a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "momentum": self.flat_buffers.momentum(),
            **self._adamw_state(),
            "skipped": self.guard.counts[2].clone(),
            **({} if self.loss_scale is None else {"loss_scale": self.loss_scale.state()}),
        }

    def _adamw_state(self) -> dict[str, Any]:
        if self.config.optimizer != "adamw":
            return {}
        return {"variance": self.flat_buffers.variance(), "optimizer_steps": self.flat_buffers.steps.clone()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; InputError if it is of another network or holds no momentum."""
        self.load_weights(state, "remove it from OUT/checkpoints, or give the --out of its run")
        try:
            self.flat_buffers.load_momentum(state.get("momentum", {}))
            if self.config.optimizer == "adamw":
                self.flat_buffers.load_variance(state.get("variance", {}))
                self.flat_buffers.steps.copy_(state["optimizer_steps"])
        except ValueError as error:
            raise InputError(f"the checkpoint can be evaluated, but not continued: {error}") from error
        if self.loss_scale is not None:
            self.loss_scale.load_state(state["loss_scale"])
        self.step = state["step"]
        self.guard.restart(int(state.get("skipped", 0)))

    def load_published(self, source: Source) -> None:
        """Start both encoders with published weights; InputError if they do not fit."""
        load_published(self.model.online.encoder, source)
        weights = self.model.online.encoder.state_dict()
        with torch.no_grad():
            for name, tensor in self.model.target.encoder.state_dict().items():
                if name in weights:
                    tensor.copy_(weights[name])

    def load_weights(self, state: dict[str, Any], remedy: str = INITIAL_REMEDY) -> None:
        """Load the weights of a checkpoint, of this or another run; InputError with `remedy` if the networks differ."""
        try:
            load_state(self.model, state["model"])
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            difference = str(error).splitlines()[-1].strip().rstrip(".")
            raise InputError(f"the checkpoint is of another network: {difference}; {remedy}") from error


def _accumulate_on(model: DSPNet, alpha: Tensor, device: torch.device) -> Accumulate:
    """`DSPNet.accumulate` on batches before normalisation. No method: a trainer that refers to itself is freed late."""

    def accumulate(batch: Tensor, subnets: Sequence[Subnet], taught: Taught | None) -> dict[str, Tensor]:
        return model.accumulate(prepare(batch, device), subnets, alpha, taught)

    return accumulate


def random_batch(config: PretrainConfig, views: int) -> Tensor:
    """Random views for measurements, of the shape and dtype of a loader's batches."""
    shape = (views, config.in_channels, config.image_size, config.image_size)
    if config.pixel_range in ("auto", EIGHT_BIT):
        return torch.randint(256, shape, dtype=torch.uint8)
    return torch.randn(shape)
