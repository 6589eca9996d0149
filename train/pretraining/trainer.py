"""The state of a pretraining run and its one step, without files, screens or data loading."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dspnet_fast.errors import InputError
from dspnet_fast.models import family
from dspnet_fast.nn.batch_norm import SlimBatchNorm
from dspnet_fast.subnets import Subnet, sandwich

from ..config import PretrainConfig
from ..data.normalization import prepare
from ..distributed.all_reduce import GradientAllReduce
from ..distributed.batch_split import divide
from ..distributed.process_group import SINGLE_PROCESS, World
from ..run.device import configure_cudnn
from ..run.schedules import learning_rate, momentum_alpha, target_tau
from .cuda_graphs import StepGraphs
from .diagnosis import Finding, find
from .dspnet import DSPNet
from .flat_buffers import FlatBuffers
from .nonfinite import Guard


def build_model(config: PretrainConfig, ranks: World = SINGLE_PROCESS) -> DSPNet:
    """The networks of a run before its first step, a function of the configuration alone."""
    parts = divide(config, ranks).parts
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
            parts,
        )


class Trainer:
    """Model, momentum and step count of a run.

    Everything else that a step depends on (learning rate, tau, alpha, sampled subnets) is a function of the step
    count, so `state` and `load_state` are all that a bit-exact resume needs.

    Args:
        config: the run.
        epoch_steps: steps in an epoch.
        device: where to train.
        ranks: the processes that train together, each on its share of every batch.
    """

    def __init__(
        self, config: PretrainConfig, epoch_steps: int, device: torch.device, ranks: World = SINGLE_PROCESS
    ) -> None:
        if device.type == "cuda":
            configure_cudnn()
        self.config = config
        self.device = device
        self.ranks = ranks
        self.model = build_model(config, ranks).to(device).to(memory_format=torch.channels_last).train()
        self.flat_buffers = FlatBuffers(self.model.online, self.model.target)
        self.guard = Guard(self.flat_buffers)
        self._division = divide(config, ranks)
        self._refuse_to_record_collectives()
        group = ranks.neighbours(self._division.ranks_per_part)
        for module in self.model.modules():
            if isinstance(module, SlimBatchNorm):
                module.process_group, module.bn_groups = group, self._division.parts
        self._exchange = GradientAllReduce(self.flat_buffers, ranks)
        self._alpha = torch.zeros((), device=device)
        self._graphs: StepGraphs | None = None
        self.step = 0
        self.steps = config.epochs * epoch_steps
        self.epoch_steps = epoch_steps
        self.warmup_steps = round(config.warmup_epochs * epoch_steps)
        self.full_only_steps = config.full_only_steps(epoch_steps)

    @property
    def learning_rate(self) -> float:
        """Of the step to come."""
        peak = self.config.base_lr * self.config.batch_size / 256
        return learning_rate(self.step, self.steps, self.warmup_steps, peak)

    @property
    def tau(self) -> float:
        """Decay of the target in the step to come."""
        return target_tau(self.step, self.steps, self.config.tau)

    def train_step(self, batch: Tensor) -> dict[str, Tensor]:
        """One step on two views; returns the losses of the sampled subnets.

        The views are uint8 [2B, C, S, S] on any device, or normalised already, float32 [2B, 3, S, S] on the trainer's;
        B is this rank's share of the batch, and the losses are of that.
        """
        subnets = self._sampled(self.step)
        self._alpha.fill_(momentum_alpha(self.step, self.steps))
        self.flat_buffers.schedule(self.learning_rate, self.tau)
        self.guard.begin()
        losses = self._accumulate(batch, subnets)
        self._share()
        if self._graphs is not None:
            self._graphs.update()
        else:
            self.update()
        self.step += 1
        return losses

    def diagnose(self, batch: Tensor) -> Finding | None:
        """Where the first number in a step on this batch is not finite; the subnets are those of the last step."""
        norms = [module for module in self.model.modules() if isinstance(module, SlimBatchNorm)]
        groups = [norm.process_group for norm in norms]
        try:
            for norm in norms:
                norm.process_group = None  # each rank looks for itself
            for part in self._division.of(batch):
                images = prepare(part, self.device)
                found = find(self.model, self.flat_buffers, images, self._sampled(self.step - 1), self._alpha)
                if found is not None:
                    return found
            return None
        finally:
            for norm, group in zip(norms, groups, strict=True):
                norm.process_group = group

    def _sampled(self, step: int) -> list[Subnet]:
        """The subnets of a step."""
        family = self.model.family
        if step < self.full_only_steps:
            return [family.full]
        return sandwich(family, self.config.subnets_per_step, self.config.seed, step)

    @property
    def _records(self) -> bool:
        return self.device.type == "cuda" and not self.config.no_cuda_graphs

    def _refuse_to_record_collectives(self) -> None:
        if self._records and (
            self._division.ranks_per_part > 1 or (self.config.overlap_all_reduce and self.ranks.size > 1)
        ):
            raise InputError(
                "CUDA graphs do not hold collectives: --overlap-all-reduce, and --bn-groups below the number of "
                "ranks, need --no-cuda-graphs"
            )

    def _accumulate(self, batch: Tensor, subnets: list[Subnet]) -> dict[str, Tensor]:
        """Gradients and running statistics of this rank's share, turn by turn; losses are the turns' mean.

        A turn counts as a rank does: each begins from the same statistics, and their mean is kept.
        """
        turns = self._division.turns
        if turns == 1:
            return self._one_turn(batch, subnets, last=True)
        statistics = self.flat_buffers.statistics
        before, total = statistics.clone(), torch.zeros_like(statistics)
        losses: dict[str, Tensor] = {}
        for turn, part in enumerate(self._division.of(batch), start=1):
            statistics.copy_(before)
            found = self._one_turn(part, subnets, last=turn == turns)
            losses = {name: losses.get(name, 0) + loss / turns for name, loss in found.items()}
            total.add_(statistics, alpha=1 / turns)
        statistics.copy_(total)
        return losses

    def _one_turn(self, batch: Tensor, subnets: list[Subnet], last: bool) -> dict[str, Tensor]:
        if self._records:
            self._graphs = self._graphs or StepGraphs(
                self.model, self.flat_buffers, batch, self._alpha, self.update, counts=self.guard.counts
            )
            return self._graphs.accumulate(batch, subnets)
        overlaps = last and self.config.overlap_all_reduce and self.ranks.size > 1
        complete = self._exchange.complete if overlaps else None
        return self.model.accumulate(prepare(batch, self.device), subnets, self._alpha, complete)

    def _share(self) -> None:
        """Gradients and running statistics become those of the whole batch."""
        self._exchange.finish()
        if (shares := self.ranks.size * self._division.turns) > 1:
            self.flat_buffers.grads /= shares
        self.ranks.average(self.flat_buffers.statistics)

    def update(self) -> None:
        """The end of a step, on the gradient of the whole batch."""
        config = self.config
        self.guard.judge()
        self.flat_buffers.update(
            weight_decay=config.weight_decay, momentum=config.momentum, eta=config.eta, apply=self.guard.finite
        )
        self.guard.settle()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "model": self.model.state_dict(),
            "momentum": self.flat_buffers.momentum(),
            "skipped": self.guard.counts[2].clone(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; InputError if it is of another network or holds no momentum."""
        self.load_weights(state)
        try:
            self.flat_buffers.load_momentum(state.get("momentum", {}))
        except ValueError as error:
            raise InputError(f"the checkpoint can be evaluated, but not continued: {error}") from error
        self.step = state["step"]
        self.guard.restart(int(state.get("skipped", 0)))

    def load_weights(self, state: dict[str, Any]) -> None:
        """Take over the weights of a checkpoint, of this or another run; InputError if the networks differ."""
        try:
            self.model.load_state_dict(state["model"])
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise InputError(
                f"the checkpoint is of another network: {str(error).splitlines()[-1].strip()}; remove it from "
                f"OUT/checkpoints, or give the --out of its run"
            ) from error
